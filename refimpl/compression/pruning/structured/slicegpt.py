r"""SliceGPT: turn the stream between layers onto its principal components, and delete the last of them from every matrix.

Source: `slicegpt` (arXiv 2401.15024), Section 3 with Theorem 1 (invariance), Section 3.3 with Eq. (8) ($Q_\ell$), Section 3.4
(slicing), Section 4 (double precision); official code
microsoft/TransformerCompression@6b12cdee6ad51791d7c776b3a046bc408b9e77e9, src/slicegpt/rotate.py, experiments/run_slicegpt.py.

Differs from the paper: the official code takes the components of the stream before its norm, where long vectors weigh more; here each
token counts as its norm leaves it, as the paper writes, and `normalize=False` is the official code's way. What is kept is left in
the order of its components; there it is mixed by a random rotation, which no result depends on. The stream behind the last block is
not turned, as it is not sliced. GPT-2, which the paper has not, keeps its embeddings whole, and its first block begins with
$Q_1$: the library takes the width at the end for that at the start. Padding counts among the calibration's positions; the
official code leaves it out. Dropout that a block of OPT applies itself while it is trained is gone.

Not here: slicing the output layer too; a schedule of different widths; LoRA on what is left.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import Anatomy, BlockParts
from refimpl.compression.calibration import batches_of, inputs_by_group
from refimpl.compression.protocol import M
from refimpl.compression.rotation import fold_norms_, read_in_, write_in_
from refimpl.model.model import RMSNorm


@dataclass(frozen=True, kw_only=True)
class SliceGPT:
    r"""Deletion of the stream's weakest directions.

    Args:
        sparsity: share of the stream's width that is deleted, 0 to below 1; the paper's are 0.2, 0.25 and 0.3. The parameters
            shrink by less: each block gets two matrices for its shortcuts.
        round_to: the width that is left is rounded down to a multiple of it, as the official code does for the sake of the
            hardware; not where that would leave nothing.
        normalize: take the components of what the norms make of the stream, instead of the stream's own.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = SliceGPT(sparsity=0.25)(model, [torch.arange(60).view(4, 15)])
        >>> small.embedding.weight.shape, small.layers[0].attention.o_proj.weight.shape, small(torch.arange(5)[None]).shape
        (torch.Size([61, 24]), torch.Size([24, 32]), torch.Size([1, 5, 61]))
    """

    sparsity: float = 0.25
    round_to: int = 8
    normalize: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be 0 (nothing is sliced) to below 1 (all is)")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1; the official code takes 8")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A copy with a narrower stream, in evaluation mode.

        Args:
            model: one that `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with;
                every position counts, padding too.

        Raises:
            ValueError: `anatomy` does not know the model, or its stream can't be turned; there is no calibration data, or the
                model can't take it.
        """
        batches = batches_of(calibration)
        small = copy.deepcopy(model).eval()
        if not self.sparsity:
            return small
        if not batches:
            raise ValueError("SliceGPT needs texts to see where the stream lies: pass `calibration`")
        parts = fold_norms_(small)
        blocks: dict[str, tuple[SlicedBlock, BlockParts]] = {}
        for block in parts.blocks:
            name = block.attention_norm.rpartition(".")[0]
            sliced = SlicedBlock(small.get_submodule(name), block, name)
            blocks[block.attention_norm] = blocks[block.feed_forward_norm] = (sliced, block)
            small.set_submodule(name, sliced)
        found: dict[str, Tensor] = {}
        for (name,), inputs in inputs_by_group(small, {name: small.get_submodule(name) for name in blocks}, batches):
            norm = cast(RMSNorm, small.get_submodule(name))
            q = principal_components(norm(inputs) if self.normalize else inputs)
            found[name] = q[:, : self.width(len(q))]
            _slice_(small, *blocks[name], name, found[name])
        _join_(small, parts, [blocks[block.attention_norm][0] for block in parts.blocks], found)
        return small

    def width(self, d_model: int) -> int:
        """Channels that are left of a stream of `d_model`.

        Examples:
            >>> [SliceGPT(sparsity=s).width(4096) for s in (0.25, 0.3)], SliceGPT(sparsity=0.9).width(32)
            ([3072, 2864], 3)
        """
        width = int((1 - self.sparsity) * d_model)
        return width - width % self.round_to or max(width, 1)


class SlicedBlock(nn.Module):
    """A block whose shortcuts change the basis: $x S_1$ plus attention, then the same with $S_2$ and the feed-forward.

    The block's modules keep their names.

    Args:
        block: of any layout that `anatomy` knows.
        parts: its parts.
        name: of the block in its model.

    Raises:
        ValueError: it attends to an encoder too.
    """

    entry: nn.Parameter | None
    attention_shortcut: nn.Parameter | None
    feed_forward_shortcut: nn.Parameter | None

    def __init__(self, block: nn.Module, parts: BlockParts, name: str) -> None:
        super().__init__()
        if getattr(block, "crossattention", None) is not None:
            raise ValueError(
                f"block {name!r} attends to an encoder too: SliceGPT takes decoders that attend to themselves"
            )
        vars(self).update({key: value for key, value in vars(block).items() if not key.startswith("_")})
        for child, module in block.named_children():
            self.add_module(child, module)
        self.takes = tuple(inspect.signature(type(block).forward).parameters)[2:]  # after self and the stream
        inside = (parts.attention_norm, parts.o, parts.feed_forward_norm, parts.up, parts.down)
        first, output, second, up, down = (part.removeprefix(f"{name}.") for part in inside)
        self.norm_names, self.attention_name = (first, second), output.rpartition(".")[0]
        self.feed_forward_names = (up.partition(".")[0],) if "." in up else (up, "activation_fn", down)
        for shortcut in ("entry", "attention_shortcut", "feed_forward_shortcut"):
            self.register_parameter(shortcut, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[batch, time, width]` to the same, or to another width; what else a block takes goes to its attention."""
        given = dict(zip(self.takes, args, strict=False)) | kwargs
        given = {key: value for key, value in given.items() if not key.startswith("encoder_")}
        x = _through(x, self.entry)
        first, second = (self.get_submodule(name) for name in self.norm_names)
        attended = self.get_submodule(self.attention_name)(first(x), **given)
        x = _through(x, self.attention_shortcut) + (attended if isinstance(attended, Tensor) else attended[0])
        inside = second(x)
        for name in self.feed_forward_names:
            inside = self.get_submodule(name)(inside)
        return _through(x, self.feed_forward_shortcut) + inside  # type: ignore[no-any-return]


def principal_components(signal: Tensor) -> Tensor:
    r"""Eigenvectors of $C = \sum_i x_i x_i^\top$ by falling eigenvalue, as columns: `[width, width]`, float64.

    Args:
        signal: `[n, width]`, one row a token.

    Examples:
        >>> principal_components(torch.tensor([[3.0, 0.0], [0.0, 5.0]])).abs().tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    signal = signal.double()
    vectors: Tensor = torch.linalg.eigh(signal.T @ signal).eigenvectors
    return vectors.flip(1)


def _through(x: Tensor, shortcut: Tensor | None) -> Tensor:
    return x if shortcut is None else x @ shortcut


def _slice_(model: nn.Module, block: SlicedBlock, parts: BlockParts, name: str, q: Tensor) -> None:
    r"""Slice what stands around a norm, inside of its block: the layers that read it, the writer and the shortcut before it.

    With $D'$ channels left of D, the norm still has to divide by $\sqrt{\sum x^2 / D + \epsilon}$; the mean over what is left is
    $D / D'$ times as large, and so is the epsilon then; the readers' weights make up for the root.

    A block's input and output keep their width until `_join_`, so that it runs beside blocks that are whole.
    """
    norm, share = cast(RMSNorm, model.get_submodule(name)), q.shape[1] / len(q)
    first = name == parts.attention_norm
    for reader in dict.fromkeys((parts.q, parts.k, parts.v) if first else (parts.gate, parts.up)):
        if reader is not None:
            read_in_(model.get_submodule(reader), q * share**-0.5)
    narrow = RMSNorm(q.shape[1], norm.eps / share).to(norm.weight.device, norm.weight.dtype)
    model.set_submodule(name, narrow.eval())
    back = nn.Parameter(q.T.to(norm.weight.dtype).contiguous())
    if first:
        block.entry, block.attention_shortcut = nn.Parameter(q.to(norm.weight.dtype).contiguous()), back
    else:
        write_in_(model.get_submodule(parts.o), q)
        block.attention_shortcut, block.feed_forward_shortcut = _then(block.attention_shortcut, q), back


def _join_(model: nn.Module, parts: Anatomy, blocks: list[SlicedBlock], found: dict[str, Tensor]) -> None:
    """Move each block's entry into what writes the stream before it."""
    whole = parts.writers[0] == "transformer.wte"  # GPT-2 reshapes what leaves the blocks to the width of what enters
    for name in () if whole else parts.writers:
        write_in_(model.get_submodule(name), found[parts.blocks[0].attention_norm])
    for (before, ahead), (_, behind) in pairwise(zip(blocks, parts.blocks, strict=True)):
        q = found[behind.attention_norm]
        write_in_(model.get_submodule(ahead.down), q)
        before.feed_forward_shortcut = _then(before.feed_forward_shortcut, q)
    for block in blocks[1:] if whole else blocks:
        block.entry = None


def _then(shortcut: nn.Parameter | None, q: Tensor) -> nn.Parameter:
    """A shortcut that ends in another basis."""
    assert shortcut is not None
    return nn.Parameter((shortcut.double() @ q).to(shortcut.dtype))
