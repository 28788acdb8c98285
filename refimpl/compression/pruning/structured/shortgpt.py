r"""ShortGPT: remove the blocks that hardly turn the hidden state.

Source: `shortgpt` (arXiv 2403.03853), Section 3.1 with Eq. (1), and Section 3.2; official code
icip-cas/ShortGPT@9a2ee8dfe9e28d0bee430e83c140b787c02ddd6c, shortgpt/shortgpt.py and metrics.py.

Differs from the paper: what is removed is given as a share of the blocks, there as their number. The official code compares
the last block's input with what comes after the final norm, as transformers lists hidden states; here it is the block's own
output, as Eq. (1) says. A hidden state of zeros counts as turned by a right angle (there, by 60 degrees).

Not here: training after the cut; the variant that leaves blocks out only while a prompt is read (ShortGPT-gen).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.blocks import find_blocks, keep_blocks
from refimpl.compression.calibration import batches_of, call
from refimpl.compression.protocol import M


@dataclass(frozen=True, kw_only=True)
class ShortGPT:
    r"""Removal of whole blocks by their Block Influence.

    Args:
        sparsity: share of the blocks removed, 0 to below 1; the nearest whole number of blocks, at least one unless it is 0,
            and never all. The paper removes about a quarter (Section 4.2).
        blocks: name of the model's list of blocks, where it has several (`model.layers`).

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = ShortGPT(sparsity=0.25)(model, [torch.arange(20).view(2, 10)])
        >>> len(small.layers), small.config.n_layers, small(torch.arange(5)[None]).shape
        (6, 6, torch.Size([1, 5, 61]))
    """

    sparsity: float = 0.25
    blocks: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be 0 (no block is removed) to below 1 (all are)")

    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A copy without the least influential blocks, in evaluation mode.

        Args:
            model: one with a list of blocks: `refimpl.model`'s decoder, or transformers' Llama, OPT, GPT-2 and the like; left
                unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with;
                every position counts, padding too.

        Raises:
            ValueError: the model has no list of blocks, or several; there is no calibration data, or the model can't take it.
        """
        name, blocks = find_blocks(model, self.blocks)
        batches = batches_of(calibration)
        removed = n_removed(len(blocks), self.sparsity)
        if removed and not batches:
            raise ValueError("ShortGPT needs texts to see how blocks turn the hidden state: pass `calibration`")
        small = copy.deepcopy(model).eval()
        if removed:
            least = block_influence(small, name, batches).argsort(stable=True)[:removed].tolist()
            keep_blocks(small, name, [place for place in range(len(blocks)) if place not in least])
        return small


def n_removed(blocks: int, sparsity: float) -> int:
    """Number of blocks to remove: the nearest to the share, halves up, at least one unless that is 0, and never all.

    Examples:
        >>> [n_removed(32, sparsity) for sparsity in (0.0, 0.01, 0.25, 0.27, 0.999)], n_removed(1, 0.5)
        ([0, 1, 8, 9, 31], 0)
    """
    return min(blocks - 1, max(int(sparsity > 0), int(blocks * sparsity + 0.5)))


@torch.no_grad()
def block_influence(model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    r"""Block Influence of each block, `[blocks]`, float64 (Eq. 1).

    $$\mathrm{BI}_i = 1 - \mathbb{E}_{X,t}\left[\frac{X_{i,t}^\top X_{i+1,t}}{\|X_{i,t}\| \|X_{i+1,t}\|}\right]$$

    Args:
        model: in evaluation mode.
        name: of its list of blocks.
        batches: what it is called with; each token weighs the same.

    Raises:
        ValueError: the model can't take a batch, or a hidden state is NaN or infinite.
    """
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    cosines = torch.zeros(len(blocks), dtype=torch.float64)
    tokens = [0] * len(blocks)

    def watch(place: int) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
            cosines[place] += cosine.double().sum().cpu()
            tokens[place] += cosine.numel()

        return note

    handles = [block.register_forward_hook(watch(place), with_kwargs=True) for place, block in enumerate(blocks)]
    try:
        for i, batch in enumerate(batches):
            call(model, batch, i)
    finally:
        for handle in handles:
            handle.remove()
    influence = 1 - cosines / torch.tensor(tokens)
    if not torch.isfinite(influence).all():
        raise ValueError(
            f"the calibration data gives blocks {(~torch.isfinite(influence)).nonzero().flatten().tolist()} NaN, or does not "
            "reach them"
        )
    return influence
