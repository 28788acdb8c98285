r"""A cache for a whole decoder, from what a method does in one layer with rows of equal length.

A padded batch is cut into parts of equal padding, and each part meets its own `LayerCache`, which therefore never sees padding:
a row in a batch is computed as it is alone. Without padding there is one part and nothing is copied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.inference.kv_cache.protocol import LayerCache

NOBODY = -(2**40)  # position of what not even a query of padding sees


class Part(NamedTuple):
    """Rows with equal padding: `rows` `[n]`, or None for all."""

    padding: int
    rows: Tensor | None


class LayeredCache:
    """A `refimpl.model.cache.Cache` made of a method's layers.

    Args:
        layer: makes the empty state of the layer with this index.
        origin: for a row of so many tokens, how many its positions are counted off by; see `Cache.length`.
    """

    def __init__(self, layer: Callable[[int], LayerCache], origin: Callable[[int], int] = lambda _: 0) -> None:
        self._new, self._origin = layer, origin
        self.reset()

    def reset(self) -> None:
        """Forget everything, and free it."""
        self._seen: dict[int, int] = {}
        self._batch = 0
        self._parts: list[Part] = []
        self._layers: dict[int, list[LayerCache]] = {}

    @property
    def length(self) -> int:
        """Where the next token stands; see `Cache.length`."""
        return self._place(max(self._seen.values(), default=0))

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that is held."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in _tensors([self._layers, self._parts])
        }
        return sum(storage.nbytes() for storage in storages.values())

    @torch.no_grad()
    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in a layer's new keys and values; see `Cache.update`. No gradient flows through.

        Raises:
            ValueError: the batch is not that of the tokens before.
        """
        k, v, queries = k.detach(), v.detach(), queries.detach()
        if not self._parts:
            self._batch, self._parts = k.shape[0], _parts(positions)
        if self._batch != k.shape[0]:
            raise ValueError(f"the cache holds a batch of {self._batch}, and gets {k.shape[0]}: reset() it first")
        seen = self._seen.get(layer, 0)
        self._seen[layer] = seen + k.shape[2]
        if layer not in self._layers:
            self._layers[layer] = self._states(layer)
        first = self._place(seen)
        if self._parts == [Part(0, None)]:
            return self._layers[layer][0].update(k, v, queries, first)
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for (padding, rows), state in zip(self._parts, self._layers[layer], strict=True):
            gap = min(max(padding - seen, 0), k.shape[2])
            mine = [(x if rows is None else x[rows])[:, :, gap:] for x in (k, v, queries)]
            if gap == k.shape[2]:
                found.append((mine[0], mine[1], None))
            else:
                found.append(state.update(mine[0], mine[1], mine[2], first + gap - padding))
        return self._merged(found, seen, k.shape[2])

    def compress_prefill(self) -> None:
        """The prompt is read and decoding begins."""
        for states in self._layers.values():
            for state in states:
                state.compress_prefill()

    def _place(self, seen: int) -> int:
        """Position of the next token in a row without padding, after `seen` tokens."""
        shortest = seen - max((part.padding for part in self._parts), default=0)
        return seen - self._origin(shortest) if shortest > 0 else seen

    def _states(self, layer: int) -> list[LayerCache]:
        """A layer's empty states, one for each part."""
        return [self._new(layer) for _ in self._parts]

    def _merged(
        self, found: list[tuple[Tensor, Tensor, Tensor | None]], seen: int, time: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One batch of the parts' results, each filled up at the left with entries that stand where its padding does."""
        end = self._place(seen) + time
        gaps = [min(max(part.padding - seen, 0), time) for part in self._parts]
        width = max(k.shape[2] + gap for (k, _, _), gap in zip(found, gaps, strict=True))
        heads = max(k.shape[1] for k, _, _ in found)  # of queries, where they read each its own
        plain = all(at is None for _, _, at in found)
        told = max((at.ndim for _, _, at in found if at is not None), default=2)
        apart = max((at.shape[1] for _, _, at in found if at is not None and at.ndim > 2), default=1)
        k, v = (x.new_zeros(self._batch, heads, width, x.shape[3]) for x in found[0][:2])
        positions = torch.full((self._batch, apart, time if told > 3 else 1, width), NOBODY, device=k.device)
        for (padding, rows), gap, (part_k, part_v, at) in zip(self._parts, gaps, found, strict=True):
            kept = part_k.shape[2]
            where = slice(None) if rows is None else rows
            k[where, :, width - kept :], v[where, :, width - kept :] = (
                _for_heads(part_k, heads),
                _for_heads(part_v, heads),
            )
            last = end - padding if gap == time else 0  # the padding's own entries must be there: its queries see them
            positions[where, :, :, : width - kept] = torch.arange(last - (width - kept), last, device=k.device)
            at = torch.arange(end - padding - kept, end - padding, device=k.device)[None] if at is None else at
            at = _for_heads(at[:, None, None] if at.ndim == 2 else at[:, :, None] if at.ndim == 3 else at, apart)
            positions[where, :, gap if at.shape[2] > 1 else 0 :, width - kept :] = at
            plain &= kept == width or end - padding <= kept
        if plain:
            return k, v, None
        return k, v, positions[:, 0, 0] if told == 2 else positions[:, :, 0] if told == 3 else positions


def _parts(positions: Tensor) -> list[Part]:
    """The rows of a batch by their padding, from the positions `[batch or 1, time]` of its first tokens."""
    if len(positions) == 1:
        return [Part(-int(positions[0, 0]), None)]
    rows: dict[int, list[int]] = {}
    for row, first in enumerate(positions[:, 0].tolist()):
        rows.setdefault(-first, []).append(row)
    if list(rows) == [0]:
        return [Part(0, None)]
    return [Part(padding, torch.tensor(which, device=positions.device)) for padding, which in sorted(rows.items())]


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """`[rows, 1 or fewer heads, ...]` for so many heads, each for its group."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)


def _tensors(thing: Any) -> list[Tensor]:
    """All tensors inside containers and objects."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    elif not isinstance(thing, list | tuple):
        thing = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    return [tensor for part in thing for tensor in _tensors(part)]
