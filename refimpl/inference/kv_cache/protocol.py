r"""What all methods share that hold the KV cache in less, drop part of it, or read part of it.

Glossary
    n, seen      tokens that a row has had, without its padding
    budget       tokens kept of them
    kept         entries that come back to attention; a head may have its own
    compression  bytes of the uncompressed cache over bytes held; for dropped tokens, n / budget
    start        position of the first new token, as decoder and queries count
    window       the most recent tokens

Tensors are `[rows, kv_heads, tokens, head_dim]`; query head h reads key head h // (heads / kv_heads).

A method is a frozen configuration; `method.cache(config)` makes an empty `refimpl.model.cache.Cache` for a decoder of that
`Config`, which turns its keys as `config.rope` says. All that lives from call to call is in the cache. Methods write one
`LayerCache`, which meets rows of equal length without padding; `layered.LayeredCache` makes a cache of it, for all layers and
for padded batches. A method that drops tokens has the field `budget`; one that keeps recent tokens as they are has
`residual_length`: made as large as the text, they must make the method exact. One that is fitted to a model offline has
`calibrated(model, texts)`, which returns it fitted; its cache works without, too.

Invariants, run for every method by `tests/inference/kv_cache/test_protocol.py`: with budget or residual as large as the text
logits are those of `FullCache`; a short text is kept; the layer's keys in chunks or at once leave the same state, where no attention
scores are needed and no block is made of what a call brings; a padded batch equals its rows one by one, whatever stands
at padding; one key head and several; `reset` forgets everything; `nbytes` is what the tensors hold that can be reached from the
cache; no gradient is held; a long prompt, and decoding far beyond the budget, leave memory bounded.

Examples:
    >>> tokens_to_keep(1000, 8), tokens_to_keep(3, 8), tokens_to_keep(0, 8)
    (125, 1, 0)
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from refimpl.model.cache import Cache
from refimpl.model.config import Config
from refimpl.model.rope import inverse_frequencies, rotate


class KVMethod(Protocol):
    """A method's configuration."""

    def cache(self, config: Config) -> Cache:
        """An empty cache for a decoder of this shape."""
        ...


class LayerCache(Protocol):
    """What one layer holds of rows that all have the same number of tokens, and no padding."""

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in new keys and values, and return what these queries attend to.

        Args:
            k: `[rows, kv_heads, time, head_dim]`, rotated to positions from `start` on; time is at least 1.
            v: `[rows, kv_heads, time, head_dim]`.
            queries: `[rows, heads, time, head_dim]`, rotated.
            start: position of the first; tokens seen, less those that the cache has counted off (see `Cache.length`).

        Returns:
            Keys, values and positions, as `Cache.update` does.
        """
        ...

    def compress_prefill(self) -> None:
        """The prompt is read and decoding begins."""
        ...


def tokens_to_keep(length: int, compression: float, least: int = 1) -> int:
    """Budget for a text: `length / compression`, rounded up, and never less than `least` while there are that many.

    Args:
        length: tokens of the text, 0 or more.
        compression: times fewer tokens, 1 or more.
        least: what the method needs to work, 1 or more.

    Raises:
        ValueError: an argument below its least value.
    """
    if length < 0 or least < 1:
        raise ValueError(f"length={length} must be at least 0, least={least} at least 1")
    if not compression >= 1:
        raise ValueError(f"compression={compression} must be at least 1, which keeps all")
    return min(length, max(least, math.ceil(length / compression - 1e-9)))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens that each head keeps.

    Args:
        x: `[rows, kv_heads, tokens, head_dim]`.
        index: `[rows, kv_heads, kept]`, int64, each head's own choice and order.

    Returns:
        `[rows, kv_heads, kept, head_dim]`.
    """
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


class Turn:
    r"""Moves keys to other positions: $R_{p + m} = R_m R_p$ for rotary positions, so that one more rotation does it.

    The last angles are kept, since all layers of a step move their keys alike.

    Args:
        config: of the decoder.

    Raises:
        ValueError: the frequencies depend on the length, so that rotations do not add up.

    Examples:
        >>> config = Config(vocabulary=2, d_model=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2)
        >>> [round(x, 4) for x in Turn(config)(torch.tensor([1.0, 0.0]), 2).tolist()]  # cos 2, sin 2
        [-0.4161, 0.9093]
    """

    def __init__(self, config: Config) -> None:
        if config.rope.type == "dynamic":
            raise ValueError(
                "rope type='dynamic' turns keys by the length of the text: they can't be moved in it; use 'yarn'"
            )
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
        self._last: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, k: Tensor, by: int) -> Tensor:
        """Keys `[..., head_dim]` as if they stood `by` positions later (negative: earlier), computed in float32 or above."""
        if self._last is None or self._last[0] != by or self._last[1].device != k.device:
            angles = by * self._frequencies.to(k.device)
            cos, sin = angles.cos(), angles.sin()
            self._last = by, torch.cat((cos, cos)), torch.cat((-sin, sin))
        wide = k if k.dtype == torch.float64 else k.float()
        _, cos, sin = self._last
        return rotate(wide, cos.to(wide.dtype), sin.to(wide.dtype)).to(k.dtype)
