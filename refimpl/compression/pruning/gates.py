r"""The shape of a decoder, gates on all that can be cut from it, and the cut.

A *gate* is a number that the output of a structure is multiplied by: a channel of the residual stream, a block, a key head with the
queries that read it, a neuron of a feed-forward. Where a gate is 0 the structure does nothing, and `cut_` removes it; all other
gates become part of the weights. The smaller model computes what the gated one does.

Source: `sheared-llama` (arXiv 2310.06694), Section 2.1; official code
princeton-nlp/LLM-Shearing@b87218b566c73f6b246aaad3e4c42883f65a48a6, llmshearing/models/composer_llama.py (and composer_pythia.py for
LayerNorm): norms are taken over the channels that are not zero.

Differs from the paper: gates of heads and neurons go into the columns of the layer that reads them (there, into the rows of the one before
it, which a GELU does not allow); the output layer's weight is not multiplied by the gates once more when it is cut, which the official
code calls a mistake; embeddings meet the gates of channels before the cut, too, where the official code first multiplies them in it.
With grouped heads a gate is a key head's; the paper's model has none.

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder
    >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=6)).eval()
    >>> gates = open_gates(shape_of(model))
    >>> gates["inner"][:, 2:] = 0.0
    >>> gates["blocks"][0] = 0.0
    >>> with gated(model, anatomy(model), gates):
    ...     expected = model(torch.arange(4)[None])
    >>> cut_(model, gates)
    >>> torch.allclose(model(torch.arange(4)[None]), expected, atol=1e-6), shape_of(model)
    (True, Shape(d_model=8, n_layers=1, n_kv_heads=2, d_ff=2))
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import Anatomy, BlockParts, anatomy
from refimpl.compression.blocks import find_blocks, keep_blocks
from refimpl.compression.pruning.slimming import keep_inputs_, keep_outputs_, recount_heads_
from refimpl.model.config import Config
from refimpl.model.linear import linear_at, sizes

KINDS = ("hidden", "blocks", "heads", "inner")
Gates = dict[str, Tensor]  # hidden [d_model], blocks [n_layers], heads [n_layers, n_kv_heads], inner [n_layers, d_ff]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that are the same in each block.

    Args:
        d_model: width of the residual stream.
        n_layers: blocks.
        n_kv_heads: heads of keys and values; how many queries read each does not change.
        d_ff: width of the feed-forward.
    """

    d_model: int
    n_layers: int
    n_kv_heads: int
    d_ff: int

    def of(self, kind: str) -> int:
        """How many gates of a kind (of each block, where they are a block's) belong to it."""
        return dict(zip(KINDS, (self.d_model, self.n_layers, self.n_kv_heads, self.d_ff), strict=True))[kind]


def shape_of(model: nn.Module) -> Shape:
    """The shape of a decoder.

    Raises:
        ValueError: `anatomy` does not know it, its blocks differ in shape, or nothing normalizes the stream at its end.
    """
    parts = anatomy(model)
    shapes = {
        Shape(
            d_model=sizes(linear_at(model, block.up))[1],
            n_layers=len(parts.blocks),
            n_kv_heads=block.n_kv_heads,
            d_ff=sizes(linear_at(model, block.up))[0],
        )
        for block in parts.blocks
    }
    if len(shapes) > 1:
        raise ValueError(
            f"blocks of {len(shapes)} shapes: {sorted(map(str, shapes))[:2]}; start from a model of one shape"
        )
    if parts.norm is None:
        raise ValueError(
            "the stream must end in a norm: a model without one has no place for the gates of its channels"
        )
    return shapes.pop()


def open_gates(shape: Shape) -> Gates:
    """Gates that are all 1."""
    n = shape.n_layers
    return {
        "hidden": torch.ones(shape.d_model),
        "blocks": torch.ones(n),
        "heads": torch.ones(n, shape.n_kv_heads),
        "inner": torch.ones(n, shape.d_ff),
    }


@contextmanager
def gated(model: nn.Module, parts: Anatomy, gates: Gates) -> Iterator[None]:
    """A model multiplied by gates until the context is left; differentiable with respect to them.

    Args:
        model: one that `shape_of` knows.
        parts: its anatomy.
        gates: of its shape.
    """
    hidden = gates["hidden"]
    norms = [name for block in parts.blocks for name in (block.attention_norm, block.feed_forward_norm)]
    with ExitStack() as hooks:
        for name in parts.writers:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(_times(hidden)))
        assert parts.norm is not None
        for name in (*norms, parts.norm):
            hooks.enter_context(model.get_submodule(name).register_forward_hook(_norm_of_open(hidden)))
        for i, block in enumerate(parts.blocks):
            heads = gates["heads"][i].repeat_interleave(block.n_heads // block.n_kv_heads * block.head_dim)
            for name, read in ((block.o, heads), (block.down, gates["inner"][i])):
                layer = model.get_submodule(name)
                hooks.enter_context(layer.register_forward_pre_hook(_times_before(read)))
                hooks.enter_context(layer.register_forward_hook(_times(gates["blocks"][i] * hidden)))
        yield


@torch.no_grad()
def cut_(model: nn.Module, gates: Gates) -> None:
    """Remove what a gate of 0 closes, and multiply the weights of the rest by their gates, in place.

    Args:
        model: one that `shape_of` knows; its configuration says the new shape afterwards.
        gates: of its shape, as many open in each block as in the others, and at least one of each kind.

    Raises:
        ValueError: another number of gates is open in one block than in another, or none is; the architecture has no place for the
            shape.
    """
    parts, blocks = anatomy(model), gates["blocks"].nonzero().flatten().tolist()
    counts = {kind: {int(row.count_nonzero()) for row in gates[kind][blocks]} for kind in ("heads", "inner")}
    counts |= {kind: {int(gates[kind].count_nonzero())} for kind in ("hidden", "blocks")}
    for kind, found in counts.items():
        if len(found) != 1 or 0 in found:
            raise ValueError(
                f"{kind} gates open in each block: {sorted(found)}; all must have as many, and at least one"
            )
    d_model, n_layers, n_kv_heads, d_ff = (counts[kind].pop() for kind in KINDS)
    new = Shape(d_model=d_model, n_layers=n_layers, n_kv_heads=n_kv_heads, d_ff=d_ff)
    check_place(model, new)
    kept = gates["hidden"].nonzero().flatten()
    hidden = gates["hidden"][kept]
    reader: Any = None if parts.reader is None else model.get_submodule(parts.reader)
    tied = reader is None or any(model.get_submodule(name).weight is reader.weight for name in parts.writers)
    for name in parts.writers:
        keep_outputs_(model.get_submodule(name), kept, hidden)
    if tied and reader is not None:
        reader.weight = model.get_submodule(parts.writers[0]).weight
        reader.in_features = len(kept)
    elif reader is not None:
        keep_inputs_(reader, kept)
    assert parts.norm is not None
    keep_outputs_(
        model.get_submodule(parts.norm), kept, None if tied else hidden
    )  # a tied reader brings the gates itself
    for i in blocks:
        _cut_block_(model, parts.blocks[i], gates, i)
    keep_blocks(model, find_blocks(model)[0], blocks)
    recount_heads_(model)
    _write_shape_(model, parts, new)


def check_place(model: nn.Module, shape: Shape) -> None:
    """Refuse a shape that an architecture can't say: OPT's and GPT-2's heads have the width of the stream over their number.

    Raises:
        ValueError: the shape is one.
    """
    config, block = getattr(model, "config", None), anatomy(model).blocks[0]
    free = isinstance(config, Config) or hasattr(config, "head_dim")
    if config is not None and not free and shape.d_model != shape.n_kv_heads * block.head_dim:
        raise ValueError(
            f"d_model={shape.d_model} with n_kv_heads={shape.n_kv_heads}: in a {type(model).__name__} the stream must be as wide as "
            f"its heads, {block.head_dim} each"
        )


def _cut_block_(model: nn.Module, block: BlockParts, gates: Gates, i: int) -> None:
    kept, heads, inner = (x.nonzero().flatten() for x in (gates["hidden"], gates["heads"][i], gates["inner"][i]))
    hidden, size = gates["hidden"][kept], block.head_dim
    group = block.n_heads // block.n_kv_heads * size
    queries, keys = (_channels(heads, n) for n in (group, size))
    if block.q == block.k:  # one layer makes queries, keys and values
        whole = block.n_heads * size
        made = {block.q: torch.cat([queries, whole + keys, whole + block.n_kv_heads * size + keys])}
    else:
        made = {block.q: queries, block.k: keys, block.v: keys}
    made |= {name: inner for name in (block.gate, block.up) if name is not None}
    for name, channels in made.items():
        keep_outputs_(model.get_submodule(name), channels)
        keep_inputs_(model.get_submodule(name), kept)
    scale = hidden * gates["blocks"][i]
    for name, read, z in (
        (block.o, queries, gates["heads"][i][heads].repeat_interleave(group)),
        (block.down, inner, gates["inner"][i][inner]),
    ):
        keep_inputs_(model.get_submodule(name), read, z)
        keep_outputs_(model.get_submodule(name), kept, scale)
    for name in (block.attention_norm, block.feed_forward_norm):
        keep_outputs_(model.get_submodule(name), kept, hidden)


def _channels(heads: Tensor, size: int) -> Tensor:
    """The channels of some heads of a size."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _write_shape_(model: nn.Module, parts: Anatomy, shape: Shape) -> None:
    """Write a shape into the configuration, of which all modules of transformers hold the same."""
    block, config = parts.blocks[0], getattr(model, "config", None)
    n_heads = block.n_heads // block.n_kv_heads * shape.n_kv_heads
    if isinstance(config, Config):
        new = dataclasses.replace(
            config, d_model=shape.d_model, n_heads=n_heads, n_kv_heads=shape.n_kv_heads, d_ff=shape.d_ff
        )
        model.config = new  # type: ignore[assignment]
    elif config is not None:
        names = {"hidden_size": shape.d_model, "num_attention_heads": n_heads, "head_dim": block.head_dim}
        names |= {"num_key_value_heads": shape.n_kv_heads}
        names |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), shape.d_ff)
        if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:  # OPT without a projection
            names["word_embed_proj_dim"] = shape.d_model
        for name, value in names.items():
            if hasattr(config, name):
                setattr(config, name, value)


def _times(gate: Tensor) -> Any:
    return lambda _module, _args, output: output * gate.to(output.dtype)


def _times_before(gate: Tensor) -> Any:
    return lambda _module, args: (args[0] * gate.to(args[0].dtype), *args[1:])


def _norm_of_open(gate: Tensor) -> Any:
    """A norm over the channels whose gate is not 0, times the gates."""

    def normalized(norm: Any, args: Any, _output: Tensor) -> Tensor:
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        counts = (gate != 0).to(x.dtype)
        n = counts.sum().clamp_min(1)
        if isinstance(norm, nn.LayerNorm):
            x = x - (x * counts).sum(-1, keepdim=True) / n
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        x = x * torch.rsqrt((x.square() * counts).sum(-1, keepdim=True) / n + eps)
        made: Tensor = norm.weight * x.to(norm.weight.dtype)
        bias = getattr(norm, "bias", None)
        return (made if bias is None else made + bias) * gate.to(made.dtype)

    return normalized
