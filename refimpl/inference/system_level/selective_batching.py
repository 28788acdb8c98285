r"""One pass of the model over requests that are at different places: some read their prompt, others their last token.

Linear layers, normalization and activations do not ask whose a token is: all tokens of the iteration go through them as one matrix
`[1, tokens, d_model]`. Attention is the only operation that does: queries, keys and values are split by request, each attends to its
own past, and the results are put together again.

Source: `orca` (Yu et al., OSDI 2022), Section 3.2 and Figure 4.

Differs from the paper: none. Where many requests read one token each, a store may attend for them in one call, as `paged_attention` does.

Not here: fused kernels for the requests' attention; models whose feed-forward layers mix tokens (experts with a capacity do), or
whose positions are added to embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from refimpl.model.cache import Cache
from refimpl.model.model import Attention, Block, Decoder
from refimpl.model.step import ScoreBias, Step


@dataclass(frozen=True)
class Part:
    """What is read of one request.

    Attributes:
        start: tokens before these.
        first: place of the first of these among all tokens of the pass.
        end: place behind the last.
    """

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share.

    Attributes:
        parts: of each request.
        cos: `[1, 1, tokens, head_dim]`, for `refimpl.model.rope.rotate`.
        sin: of the same shape.
        positions: `[1, tokens]`, each token's place in its own request.
        score_bias: that of the decoder.
    """

    parts: list[Part]
    cos: Tensor
    sin: Tensor
    positions: Tensor
    score_bias: ScoreBias | None

    def step(self, part: Part, cache: Cache) -> Step:
        """A request's own step, as `Attention.mix` takes it."""
        mine = slice(part.first, part.end)
        return Step(
            part.start,
            self.positions[:, mine],
            self.cos[:, :, mine],
            self.sin[:, :, mine],
            cache,
            None,
            self.score_bias,
        )


class Attend(Protocol):
    """How the requests of one pass attend, in every layer."""

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From `[1, heads or kv_heads, tokens, head_dim]`, rotated, of all requests to what their queries find, q's shape."""
        ...


class AttendTo(Protocol):
    """Makes a pass's `Attend`."""

    def __call__(self, whole: Pass) -> Attend:
        """For the requests of this pass, in the order in which they are read."""
        ...


def separately(whole: Pass, caches: Sequence[Cache]) -> Attend:
    """Each request against its own cache, one after another."""
    steps = [whole.step(part, cache) for part, cache in zip(whole.parts, caches, strict=True)]

    def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [part.end - part.first for part in whole.parts]
        mine = zip(*(torch.split(x, sizes, dim=2) for x in (q, k, v)), steps, strict=True)
        return torch.cat([attention.mix(*one) for one in mine], dim=2)

    return attend


def read(model: Decoder, texts: Sequence[Sequence[int]], starts: Sequence[int], attend_to: AttendTo) -> Tensor:
    """Read what is new of each request.

    Args:
        model: the decoder.
        texts: new tokens of each request, at least one.
        starts: tokens of each that were read before.
        attend_to: how they attend.

    Returns:
        `[requests, d_model]`, the normalized hidden state behind each request's last token, for `Decoder.logits`.

    Raises:
        ValueError: an attention module that is not the decoder's own, since it can't be split.

    Examples:
        >>> from refimpl.model.cache import FullCache
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> caches = [FullCache(), FullCache()]
        >>> hidden = read(model, [(5, 7, 33), (8,)], [0, 0], lambda whole: separately(whole, caches))
        >>> hidden.shape, [cache.length for cache in caches]
        (torch.Size([2, 32]), [3, 1])
        >>> torch.allclose(hidden[1], model.hidden(torch.tensor([[8]]))[0, 0], atol=1e-6)
        True
    """
    layers = [cast(Block, layer) for layer in model.layers]
    for i, layer in enumerate(layers):
        if type(layer.attention) is not Attention:
            name = type(layer.attention).__name__
            raise ValueError(f"layers[{i}].attention={name} can't be split by request: it must be the decoder's own")
    tokens = torch.tensor([token for text in texts for token in text], device=model.embedding.weight.device)
    x = model.embedding(tokens)[None]
    whole = _pass(model, [len(text) for text in texts], starts, x)
    attend = attend_to(whole)
    for layer in layers:
        q, k, v = layer.attention.project(layer.attention_norm(x), whole.cos, whole.sin)
        x = x + layer.attention.output(attend(layer.attention, q, k, v))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    last = torch.tensor([part.end - 1 for part in whole.parts], device=x.device)
    return model.norm(x[0, last])  # type: ignore[no-any-return]


def _pass(model: Decoder, sizes: Sequence[int], starts: Sequence[int], x: Tensor) -> Pass:
    """Places and rotations; parts of one size are turned as rows of a batch, since frequencies may depend on a row's length."""
    parts: list[Part] = []
    for size, start in zip(sizes, starts, strict=True):
        first = parts[-1].end if parts else 0
        parts.append(Part(start, first, first + size))
    positions = torch.empty(x.shape[1], dtype=torch.int64)
    turned: dict[int, tuple[Tensor, Tensor]] = {}
    for size in set(sizes):
        which = [i for i, part in enumerate(parts) if part.end - part.first == size]
        at = torch.tensor([starts[i] for i in which])[:, None] + torch.arange(size)
        for i, row in zip(which, at, strict=True):
            positions[parts[i].first : parts[i].end] = row
        cos, sin = model.rotary(at.to(x.device), x.dtype)
        turned |= {i: (cos[row : row + 1], sin[row : row + 1]) for row, i in enumerate(which)}
    cos, sin = (torch.cat([turned[i][which] for i in range(len(parts))], dim=2) for which in (0, 1))
    return Pass(parts, cos, sin, positions[None].to(x.device), model.score_bias)
