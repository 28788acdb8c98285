"""A tensor to which tokens are appended at its end, and from whose front they are dropped."""

from torch import Tensor


class MovingWindow:
    """Tokens `[rows, heads, tokens, ...]`, with a sixteenth of room, so that a step copies its own token and seldom all.

    Examples:
        >>> import torch
        >>> held = MovingWindow()
        >>> held.append(torch.arange(5.0).view(1, 1, 5))
        >>> held.drop(3)
        >>> held.append(torch.tensor([[[7.0]]]))
        >>> held.all().tolist(), held.length
        ([[[3.0, 4.0, 7.0]]], 3)
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._start = self._end = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._end - self._start

    def append(self, x: Tensor) -> None:
        """Copy tokens behind the last; the first call sets the other dimensions, the dtype and the device."""
        if self._room is None or self._end + x.shape[2] > self._room.shape[2]:
            need = self.length + x.shape[2]
            room = x.new_empty((*x.shape[:2], need + (need // 16 if self._room is not None else 0), *x.shape[3:]))
            if self._room is not None:
                room[:, :, : self.length] = self.all()
            self._room, self._start, self._end = room, 0, self.length
        self._room[:, :, self._end : self._end + x.shape[2]] = x
        self._end += x.shape[2]

    def drop(self, count: int) -> None:
        """Forget the first tokens.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= count <= self.length:
            raise ValueError(f"count={count} must be from 0 to the {self.length} tokens held")
        self._start += count

    def all(self) -> Tensor:
        """A view of all tokens held, good until the next `append`.

        Raises:
            ValueError: nothing was appended yet.
        """
        if self._room is None:
            raise ValueError("nothing was appended yet")
        return self._room[:, :, self._start : self._end]
