r"""The parts of a decoder by their role, whatever a library calls them: who writes, who reads, who feeds whom.

Three layouts are known, by the names of a block's modules: that of `refimpl.model`, that of transformers' Llama (Mistral, Qwen2
and Qwen3 have the same), and those of OPT and GPT-2. In each, a block normalizes before attention and before its feed-forward, and
adds what they make to the residual stream.

A *feed* is a tensor inside a block that one module makes channel by channel, and linear layers read: a norm's output, the
values on their way through attention, the inside of a feed-forward that is linear in its last factor. Such a channel can be
divided by a number where it is made and multiplied by it where it is read (`rescale_`): no output of the model changes, but what is
read has another range.

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder
    >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6))
    >>> for feed in feeds(model, anatomy(model).blocks[0]):
    ...     print(feed.producer.removeprefix("layers.0."), [name.rpartition(".")[2] for name in feed.consumers])
    attention_norm ['q_proj', 'k_proj', 'v_proj']
    attention.v_proj ['o_proj']
    feed_forward_norm ['gate_proj', 'up_proj']
    feed_forward.up_proj ['down_proj']
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.blocks import find_blocks
from refimpl.model.linear import is_linear, linear_at, sizes, weight_of

# Names inside a block: norm, queries, keys, values, output; norm, gate (None: there is none), up, down.
LAYOUTS: dict[str, tuple[str | None, ...]] = {
    "refimpl": (
        *("attention_norm", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        *("feed_forward_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    ),
    "llama": (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "opt": (
        *("self_attn_layer_norm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("final_layer_norm", None, "fc1", "fc2"),
    ),
    "gpt2": (
        *("ln_1", "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
        *("ln_2", None, "mlp.c_fc", "mlp.c_proj"),
    ),
}
# Names outside of the blocks, as far as a model has them: what is summed into the stream, the last norm, what reads that.
OUTSIDE: dict[str, tuple[tuple[str, ...], str, str]] = {
    "refimpl": (("embedding",), "norm", "lm_head"),
    "llama": (("model.embed_tokens",), "model.norm", "lm_head"),
    "opt": (
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "model.decoder.final_layer_norm",
        "lm_head",
    ),
    "gpt2": (("transformer.wte", "transformer.wpe"), "transformer.ln_f", "lm_head"),
}


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Names of a block's modules in its model, and the shape of its heads.

    Attributes:
        attention_norm: normalizes what attention reads.
        q: makes the queries; in GPT-2 one layer makes queries, keys and values, and has all three names.
        k: makes the keys.
        v: makes the values.
        o: attention's output layer.
        feed_forward_norm: normalizes what the feed-forward reads.
        gate: makes what the inside of a gated feed-forward is multiplied by, after its activation; None where there is none.
        up: makes the inside of the feed-forward.
        down: the feed-forward's output layer.
        n_heads: of queries.
        n_kv_heads: of keys and values.
        head_dim: channels of a head.
        scales_through: whether a positive factor on a channel of `up` reaches `down` as it is: in a gated feed-forward, and
            after ReLU; not after GELU.
    """

    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    feed_forward_norm: str
    gate: str | None
    up: str
    down: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scales_through: bool

    @property
    def linear(self) -> list[str]:
        """Names of its linear layers, each once, in the order in which data reaches them."""
        names = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Names of a decoder's parts.

    Attributes:
        writers: what is summed into the stream before the first block: embeddings, or the projection that follows them.
        blocks: in their order.
        norm: normalizes the stream after the last block; None where nothing does.
        reader: the linear layer that reads it: the output layer, or the projection before it; None where the embedding
            does, without a module of its own.
    """

    writers: tuple[str, ...]
    blocks: tuple[BlockParts, ...]
    norm: str | None
    reader: str | None


@dataclass(frozen=True, eq=False)
class Feed:
    """A tensor inside of a block that is made channel by channel.

    Attributes:
        producer: name of the module that makes it: a norm, or a linear layer.
        consumers: names of the linear layers that read it.
        source: `[in]`, the channel of the producer that each column of a consumer reads; with grouped heads, several columns
            read one.
    """

    producer: str
    consumers: tuple[str, ...]
    source: Tensor


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a decoder.

    Raises:
        ValueError: its layout is none of those known, or it normalizes in another way.
    """
    name, blocks = find_blocks(model)
    layout = next((kind for kind, parts in LAYOUTS.items() if _has(blocks[0], parts)), None)
    if layout is None:
        raise ValueError(
            f"a block of type {type(blocks[0]).__name__} has another layout than those known: that of refimpl.model, and those of "
            "transformers' Llama, Mistral, Qwen2, Qwen3, OPT and GPT-2"
        )
    writers, norm, reader = OUTSIDE[layout]
    if layout == "opt":
        stack = model.get_submodule("model.decoder")
        if not stack.layers[0].do_layer_norm_before:  # type: ignore[union-attr,index]
            raise ValueError(
                "this OPT normalizes after each addition (do_layer_norm_before=False), where no norm feeds a layer"
            )
        if getattr(stack, "project_in", None) is not None:  # writes, together with the positions
            writers = ("model.decoder.project_in", writers[1])
            reader = "model.decoder.project_out"
    parts = tuple(_parts(model, f"{name}.{i}", block, layout) for i, block in enumerate(blocks))
    found = Anatomy(
        writers=writers,
        blocks=parts,
        norm=norm if _module(model, norm) is not None else None,
        reader=reader if _module(model, reader) is not None else None,
    )
    for part in (*(block.attention_norm for block in parts), *(block.feed_forward_norm for block in parts), found.norm):
        if part is not None:
            _check_norm(part, model.get_submodule(part))
    return found


def feeds(model: nn.Module, block: BlockParts) -> Iterator[Feed]:
    """The feeds of a block, in the order in which data reaches them.

    Examples:
        Two query heads read the values of one:

        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder
        >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6))
        >>> [feed.source.tolist() for feed in feeds(model, anatomy(model).blocks[0])][1]
        [0, 1, 2, 3, 0, 1, 2, 3]
    """
    inner, width = sizes(linear_at(model, block.up))
    yield Feed(block.attention_norm, tuple(dict.fromkeys((block.q, block.k, block.v))), torch.arange(width))
    first = (
        sizes(linear_at(model, block.v))[0] - block.n_kv_heads * block.head_dim
    )  # a fused layer makes the values last
    values = first + torch.arange(block.n_kv_heads * block.head_dim).view(block.n_kv_heads, block.head_dim)
    yield Feed(block.v, (block.o,), values.repeat_interleave(block.n_heads // block.n_kv_heads, dim=0).flatten())
    yield Feed(block.feed_forward_norm, tuple(n for n in (block.gate, block.up) if n is not None), torch.arange(width))
    if block.scales_through:
        yield Feed(block.up, (block.down,), torch.arange(inner))


@torch.no_grad()
def rescale_(model: nn.Module, feed: Feed, scale: Tensor) -> None:
    """Divide a feed's channels where they are made and multiply them where they are read, in place.

    Args:
        model: that of the feed.
        feed: one of `feeds`.
        scale: `[channels of the producer]`, positive; only what stands in `feed.source` is used.

    Raises:
        ValueError: the scale has another size, or is not positive and finite.
    """
    producer = model.get_submodule(feed.producer)
    channels = sizes(producer)[0] if is_linear(producer) else _norm_weight(producer).numel()
    if scale.shape != (channels,):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} must be [{channels}], a number for each channel of {feed.producer}"
        )
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(
            f"the scale of {feed.producer} must be positive and finite: it spans {scale.min():g} to {scale.max():g}"
        )
    used = torch.zeros(channels, dtype=torch.bool, device=scale.device).index_fill_(
        0, feed.source.to(scale.device), True
    )
    divisor = torch.where(used, scale, 1.0)
    made = weight_of(producer) if is_linear(producer) else _norm_weight(producer)
    made.copy_(widened(made) / (divisor[:, None] if made.ndim == 2 else divisor))
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.copy_(widened(bias) / divisor)
    for name in feed.consumers:
        weight = weight_of(linear_at(model, name))
        weight.copy_(widened(weight) * scale[feed.source.to(scale.device)])


def widened(x: Tensor) -> Tensor:
    """Half precision in float32, all else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _has(block: nn.Module, parts: tuple[str | None, ...]) -> bool:
    return all(part is None or _module(block, part) is not None for part in parts)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its dotted name, or None."""
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


def _parts(model: nn.Module, prefix: str, block: nn.Module, layout: str) -> BlockParts:
    names = [part and f"{prefix}.{part}" for part in LAYOUTS[layout]]
    attention_norm, q, k, v, o, feed_forward_norm, gate, up, down = names
    assert attention_norm and q and k and v and o and feed_forward_norm and up and down
    for name in (q, k, v, o, up, down):
        if not is_linear(model.get_submodule(name)):
            raise ValueError(
                f"layer {name!r} is a {type(model.get_submodule(name)).__name__} and must be a linear layer that nothing has "
                "compressed or wrapped: start from the original model"
            )
    head_dim = int(model.get_submodule(o.rpartition(".")[0]).head_dim)  # type: ignore[arg-type]
    heads = 3 if q == v else 1
    activation = _module(block, "activation_fn") or _module(block, "mlp.act")
    return BlockParts(
        attention_norm=attention_norm,
        q=q,
        k=k,
        v=v,
        o=o,
        feed_forward_norm=feed_forward_norm,
        gate=gate,
        up=up,
        down=down,
        n_heads=sizes(linear_at(model, o))[1] // head_dim,
        n_kv_heads=sizes(linear_at(model, v))[0] // heads // head_dim,
        head_dim=head_dim,
        scales_through=gate is not None or isinstance(activation, nn.ReLU),
    )


def _norm_weight(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@torch.no_grad()
def _check_norm(name: str, norm: nn.Module) -> None:
    """Refuse a norm whose output is not its weight times something, plus its bias: Gemma's weight counts from 1."""
    weight, x = _norm_weight(norm), None
    kept = weight.clone()
    bias = getattr(norm, "bias", None)
    x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
    try:
        made = norm(x)
        weight.mul_(2)
        doubled = norm(x)
    finally:
        weight.copy_(kept)
    expected = 2 * made - (0 if bias is None else bias)
    if not torch.allclose(doubled.float(), expected.float(), rtol=0.02, atol=1e-3):
        raise ValueError(
            f"norm {name!r}, a {type(norm).__name__}, does not multiply by its weight: scales can't be absorbed in it"
        )
