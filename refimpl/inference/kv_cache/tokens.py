"""A tensor that grows along its tokens."""

from torch import Tensor


class Tokens:
    """Tokens `[rows, kv_heads, tokens, ...]` that are appended to, with a sixteenth of room, so that few appends copy.

    Without the least room that `FullCache` makes: what is held here may be small, and room counts as bytes.

    Examples:
        >>> import torch
        >>> held = Tokens()
        >>> held.append(torch.zeros(1, 2, 32, 4))
        >>> held.append(torch.ones(1, 2, 1, 4))
        >>> held.length, held.all().shape, held.nbytes == (33 + 2) * 2 * 4 * 4
        (33, torch.Size([1, 2, 33, 4]), True)
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        return 0 if self._room is None else self._room.nbytes

    def append(self, x: Tensor) -> None:
        """Copy tokens behind the last; the first call sets the other dimensions, the dtype and the device."""
        need = self.length + x.shape[2]
        if self._room is None or need > self._room.shape[2]:
            spare = need // 16 if self.length else 0  # a prompt takes its own room only
            room = x.new_empty((*x.shape[:2], need + spare, *x.shape[3:]))
            if self._room is not None:
                room[:, :, : self.length] = self.all()
            self._room = room
        self._room[:, :, self.length : need] = x
        self.length = need

    def all(self) -> Tensor:
        """A view of all tokens.

        Raises:
            ValueError: nothing was appended yet.
        """
        if self._room is None:
            raise ValueError("nothing was appended yet")
        return self._room[:, :, : self.length]
