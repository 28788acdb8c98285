r"""A cache whose rows have different lengths, so that each keeps the guesses that were accepted in it and no others.

A row's keys and values stand side by side from entry 0 on; what a row rejected is overwritten by what it reads next.
Nothing is moved when rows part, and the memory is that of the longest row. While they have parted, a call builds a mask in each
layer (`[batch, 1, time, kept]`) and writes by index; as long as they are even, as a batch of one always is, it costs what
`FullCache` costs.

Source: none. Differs from `refimpl.model.cache.FullCache`: goes back row by row; keeps all keys of sliding-window layers too,
since a draft is taken back further than a window would allow, and the mask hides what is outside of it.

Not here: branches of a tree of guesses, which share a past and are not a row's next entries (`tree.TreeCache`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Layer:
    """Buffers `[batch, kv_heads, capacity, head_dim]`, and how much of each row is held, `[batch]` on the CPU."""

    k: Tensor
    v: Tensor
    lengths: Tensor


class RaggedCache:
    """Keys and values of rows that go on at their own pace: a `refimpl.model.cache.Cache`.

    The decoder takes all rows to begin at the longest one's length; so pass it `shifted(padding)` in the place of `padding`.

    Args:
        reserve: tokens to make room for at once.

    Examples:
        >>> cache, x = RaggedCache(), torch.ones(2, 1, 3, 4)
        >>> _ = cache.update(0, x, x, x, torch.arange(3)[None])
        >>> cache.truncate(torch.tensor([3, 1]))
        >>> cache.length, cache.lengths.tolist(), cache.shifted(None).tolist()
        (3, [3, 1], [0, 2])
        >>> new = x[:, :, :1]
        >>> cache.update(0, new, new, new, torch.tensor([[3], [1]]))[2].tolist()
        [[0, 1, 2, 3], [0, 1, -1, -1]]
    """

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self._layers: dict[int, _Layer] = {}
        self._places: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of one call, for all its layers

    @property
    def length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max()) if self._layers else 0

    @property
    def lengths(self) -> Tensor:
        """Tokens that each row holds, left padding included, `[batch]` on the CPU; none before the first `update`."""
        held = [layer.lengths for layer in self._layers.values()]
        return torch.stack(held).amax(dim=0) if held else torch.zeros(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers.values())

    def shifted(self, padding: Tensor | None) -> Tensor | None:
        """Padding `[batch]` that gives a decoder the right positions: what a row lacks of the longest is added to it."""
        lengths = self.lengths
        if len(lengths) == 0 or bool((lengths == lengths[0]).all()):
            return padding
        lag = lengths.max() - lengths
        return lag if padding is None else lag.to(padding.device) + padding

    def update(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002 - the protocol's
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put each row's new tokens behind its own, and return all; see `refimpl.model.cache.Cache.update`.

        Raises:
            ValueError: the batch is not that of the tokens before.
        """
        batch, _, time, _ = k.shape
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = _Layer(k[:, :, :0], v[:, :, :0], torch.zeros(batch, dtype=torch.int64))
        if len(held.k) != batch:
            raise ValueError(f"the cache holds a batch of {len(held.k)}, and gets {batch}: reset() it first")
        start, (low, high) = held.lengths, (int(x) for x in held.lengths.aminmax())
        self._make_room(held, high + time)
        held.lengths = start + time
        if low == high:
            held.k[:, :, low : low + time], held.v[:, :, low : low + time] = k, v
            return held.k[:, :, : low + time], held.v[:, :, : low + time], None
        entries, seen = self._ragged(start, time, positions)
        rows = torch.arange(batch, device=k.device)[:, None]
        held.k[rows, :, entries], held.v[rows, :, entries] = k.transpose(1, 2), v.transpose(1, 2)
        return held.k[:, :, : high + time], held.v[:, :, : high + time], seen

    def compress_prefill(self) -> None:
        """Nothing: all is kept."""

    def truncate(self, lengths: Tensor) -> None:
        """Forget what follows the first `lengths` tokens of each row, `[batch]`.

        A layer that was skipped, and holds less, stays as it is.

        Raises:
            ValueError: a length below 0 or above what is held, or another batch.
        """
        lengths, held = lengths.cpu(), self.lengths
        if lengths.shape != held.shape or bool(((lengths < 0) | (lengths > held)).any()):
            raise ValueError(f"lengths={lengths.tolist()} can't be gone back to from {held.tolist()}")
        for layer in self._layers.values():
            layer.lengths = torch.minimum(layer.lengths, lengths)

    def reset(self) -> None:
        """Forget everything, and free the buffers."""
        self._layers.clear()
        self._places = None

    def _make_room(self, held: _Layer, need: int) -> None:
        capacity = held.k.shape[2]
        if need > capacity:
            more = max(need, self.reserve, 2 * capacity) - capacity
            # zeros: an entry that nobody attends to has weight 0, and 0 times what stands there must be 0
            held.k, held.v = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (held.k, held.v))

    def _ragged(self, start: Tensor, time: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Entries that new tokens go to, `[batch, time]`, and positions of all entries, `[batch, kept]`, -1 behind the end."""
        if self._places is None or self._places[0] is not positions or not torch.equal(self._places[1], start):
            at = start.to(positions.device)[:, None]
            entries = at + torch.arange(time, device=positions.device)
            index = torch.arange(int(start.max()) + time, device=positions.device)
            seen = torch.where(index < at + time, index - at + positions[:, :1], -1)
            self._places = positions, start, entries, seen
        return self._places[2], self._places[3]
