r"""The cache: keys and values of the past, an object that the caller passes, and that a method replaces.

A decoder hands each layer's new keys and values to `update` and attends to what comes back: all of the past (`FullCache`),
or what a method keeps, rebuilds or retrieves of it.

Examples:
    >>> import torch
    >>> cache = FullCache()
    >>> x = torch.ones(1, 2, 3, 4)
    >>> k, v, positions = cache.update(0, x, x, x, torch.arange(3)[None])
    >>> k.shape, positions, cache.length, cache.nbytes
    (torch.Size([1, 2, 3, 4]), None, 3, 192)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

STEP = 64  # tokens of room, at least


class Cache(Protocol):
    """What a decoder asks of a cache."""

    @property
    def length(self) -> int:
        """Where the next token stands: tokens seen, whatever is kept of them; a decoder reads it before the first `update`.

        A cache that places tokens inside itself counts off here by how much it has moved them; then every row must have
        at least as many tokens, and all positions that `update` returns are moved alike.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held, room for tokens to come included."""
        ...

    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in a layer's new keys and values, and return what these queries attend to.

        Args:
            layer: its index.
            k: `[batch, kv_heads, time, head_dim]`, rotated.
            v: `[batch, kv_heads, time, head_dim]`.
            queries: `[batch, heads, time, head_dim]`, rotated.
            positions: `[batch or 1, time]` of the new keys; below 0 is padding.

        Returns:
            Keys and values `[batch, kv_heads, kept, head_dim]`, and their positions: `[batch or 1, kept]` or
            `[batch or 1, kv_heads, kept]`, below 0 for an entry that nobody attends to; `[batch or 1, 1 or kv_heads, time,
            kept]` where each query is to see entries of its own, as in a tree of guesses; None stands for the last `kept`
            tokens in order, the new ones among them. Where each query head reads its own, `heads` stands for `kv_heads`.
        """
        ...

    def compress_prefill(self) -> None:
        """The prompt is read and decoding begins; `generate` calls it once."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...


@runtime_checkable
class Reader(Protocol):
    """A cache that wants to know which tokens come, and not their keys alone."""

    def read(self, tokens: Tensor) -> None:
        """The tokens `[batch, time]` that each layer will hand over next; a decoder tells them before its first layer."""
        ...


@dataclass
class _Layer:
    """Buffers `[batch, kv_heads, capacity, head_dim]` of which start:end is held, and tokens seen."""

    k: Tensor
    v: Tensor
    start: int = 0
    end: int = 0
    seen: int = 0


class FullCache:
    """All keys and values; of a sliding-window layer those that a query can still see.

    Full buffers get a sixteenth more than they need, at least 64 tokens (that of a window moves on every 64), so that most steps copy
    their own token only. What `update` returns are views of them, which later calls leave as they are unless `truncate` came between.

    Args:
        windows: each layer's window in tokens, None for all, as `Config.sliding_window`; empty keeps all.
        reserve: tokens to make room for at once; a known number spares the copies, and the bytes that are held ahead.
    """

    def __init__(self, windows: Sequence[int | None] = (), reserve: int = 0) -> None:
        self.windows, self.reserve = tuple(windows), reserve
        self._layers: dict[int, _Layer] = {}

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max((layer.seen for layer in self._layers.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers.values())

    def update(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002 - the protocol's, as the next
        positions: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, None]:
        """Append, and return all that is held; see `Cache.update`.

        Raises:
            ValueError: the batch is not that of the tokens before.
        """
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = _Layer(k[:, :, :0], v[:, :, :0])
        if held.k.shape[0] != k.shape[0]:
            raise ValueError(f"the cache holds a batch of {held.k.shape[0]}, and gets {k.shape[0]}: reset() it first")
        time = k.shape[2]
        window = self.windows[layer] if self.windows else None
        if window is not None:
            held.start = max(held.start, held.end - window + 1)
        self._make_room(held, time, window)
        start, before, end = held.start, held.end, held.end + time
        held.k[:, :, before:end] = k
        held.v[:, :, before:end] = v
        held.end, held.seen = end, held.seen + time
        return held.k[:, :, start:end], held.v[:, :, start:end], None

    def compress_prefill(self) -> None:
        """Nothing: all is kept."""

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`, as a speculative decoder does with those that it rejects.

        Raises:
            ValueError: more tokens than were seen, or so few that a window would reach back to what is gone.
        """
        for index, held in self._layers.items():
            end = held.end - (held.seen - length)
            window = self.windows[index] if self.windows else None
            visible = length if window is None else min(length, window - 1)
            if not 0 <= length <= held.seen or end - held.start < visible:
                raise ValueError(
                    f"length={length} can't be gone back to from {held.seen}: layer {index}, window {window}"
                )
        for held in self._layers.values():
            held.end, held.seen = held.end - (held.seen - length), length

    def reset(self) -> None:
        """Forget everything, and free the buffers."""
        self._layers.clear()

    def _make_room(self, held: _Layer, time: int, window: int | None) -> None:
        """Move what is held to new buffers if `time` more tokens do not fit."""
        capacity, need = held.k.shape[2], held.end - held.start + time
        if held.end + time <= capacity:
            return
        if held.seen:
            size = need + (max(STEP, need // 16) if window is None else STEP)
        else:  # a prompt's room in a window is given back by the next call
            size = max(need, self.reserve) if window is None else need
        held.k, held.v = (resized(x[:, :, held.start : held.end], size) for x in (held.k, held.v))
        held.start, held.end = 0, held.end - held.start


def resized(x: Tensor, size: int) -> Tensor:
    """A buffer of `size` tokens that begins with x."""
    new = x.new_empty((*x.shape[:2], size, x.shape[3]))
    new[:, :, : x.shape[2]] = x
    return new
