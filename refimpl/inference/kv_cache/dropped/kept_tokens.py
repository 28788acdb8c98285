r"""Tokens that are appended, judged, and dropped again, by each head for itself.

When one token too many is held, nothing moves but the newest: at the next `append` it takes the place of the one that goes, so
that a step copies one token and not the whole cache. When more go, those that stay are gathered into buffers of their own size,
and the rest is freed.
"""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.protocol import gather_tokens
from refimpl.model.cache import resized


class KeptTokens:
    """Keys, values, positions and a method's notes on each token.

    Args:
        room: entries that buffers are made for once they are full, the budget and the token that comes; None grows by sixteenths.
        shared: all heads of a row keep the same tokens, and positions are held once.

    Examples:
        >>> held, x = KeptTokens(room=3), torch.arange(4.0).view(1, 1, 4, 1)
        >>> held.append(x, x, start=0)
        >>> held.cut(torch.tensor([[[0.5, 0.1, 0.3, 0.9]]]), 2)
        >>> held.append(x[:, :, :1], x[:, :, :1], start=4)
        >>> held.positions.tolist(), held.entries()[1].flatten().tolist()
        ([[[0, 3, 4]]], [0.0, 3.0, 0.0])
    """

    def __init__(self, room: int | None = None, *, shared: bool = False) -> None:
        self.room, self.shared = room, shared
        self.length = 0  # entries, with the one that goes at the next append
        self.dropped = False
        self._buffers: list[Tensor] = []  # [rows, kv_heads (or 1), capacity, width]: keys, values, positions, notes
        self._going: Tensor | None = None  # [rows, kv_heads or 1, 1]

    @property
    def keys(self) -> Tensor:
        """A view, `[rows, kv_heads, length, head_dim]`."""
        return self._buffers[0][:, :, : self.length]

    @property
    def positions(self) -> Tensor:
        """A view, `[rows, kv_heads or 1, length]`, int32."""
        return self._buffers[2][:, :, : self.length, 0]

    @property
    def notes(self) -> Tensor:
        """A view, `[rows, kv_heads or 1, length, width]`, to be written to."""
        return self._buffers[3][:, :, : self.length]

    def entries(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and positions as `Cache.update` returns them; the first two are views, good until the next `append`."""
        values, at = self._buffers[1][:, :, : self.length], self.positions.long() if self.dropped else None
        return self.keys, values, at[:, 0] if at is not None and self.shared else at

    def append(self, k: Tensor, v: Tensor, start: int, notes: Tensor | None = None) -> None:
        """Take in tokens, after dropping the one that goes.

        Args:
            k: `[rows, kv_heads, time, head_dim]`.
            v: the same shape.
            start: position of the first.
            notes: `[rows, kv_heads or 1, time, width]`; either always or never given.
        """
        self._drop_one()
        rows, kv_heads, time, _ = k.shape
        at = torch.arange(start, start + time, dtype=torch.int32, device=k.device).view(1, 1, time, 1)
        new = [k, v, at.expand(rows, 1 if self.shared else kv_heads, time, 1)]
        if notes is not None:
            new.append(notes)
        need = self.length + time
        if not self._buffers or need > self._buffers[0].shape[2]:
            size = need + need // 16 if self._buffers else need  # a prompt takes its own room only
            if self.room is not None:
                size = max(need, min(size, self.room))
            old = [x[:, :, : self.length] for x in self._buffers] or [x[:, :, :0] for x in new]
            self._buffers = [resized(x, size) for x in old]
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[:, :, self.length : need] = x
        self.length = need

    def cut(self, worth: Tensor, keep: int) -> None:
        """Drop the entries of least worth, of equal ones the later, so that `keep` remain; what `entries` gave out stays as it was.

        Args:
            worth: `[rows, kv_heads (or 1, if shared), length]`.
            keep: 0 or more; nothing happens if there are no more than that.
        """
        if self.length <= keep:
            return
        self.dropped = True
        if self.length == keep + 1:
            self._going = keep - worth.flip(2).argmin(dim=2, keepdim=True)
            return
        index = worth.sort(dim=2, descending=True, stable=True).indices[:, :, :keep].sort(dim=2).values
        size = max(keep, self.room or 0)
        self._buffers = [resized(gather_tokens(x, _for_heads(index, x)), size) for x in self._buffers]
        self.length = keep

    def _drop_one(self) -> None:
        """Write the last entry over the one that goes."""
        if self._going is None:
            return
        self.length -= 1
        for buffer in self._buffers:
            last = buffer[:, :, self.length : self.length + 1].clone()
            index = _for_heads(self._going, buffer).unsqueeze(-1).expand_as(last)
            buffer.scatter_(2, index, last)
        self._going = None


def _for_heads(index: Tensor, x: Tensor) -> Tensor:
    """Entries `[rows, 1 or heads, n]` for all heads that x has."""
    return index.expand(-1, x.shape[1], -1)
