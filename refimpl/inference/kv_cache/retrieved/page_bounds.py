r"""Pages of keys and what bounds a query's score in each: the least and the greatest number of every channel.

A page p holds the keys of tokens $pS$ to $pS + S - 1$. With $m$ and $M$, the elementwise minimum and maximum of its keys, no key k
of it has a larger product with a query than $U = \sum_i \max(q_i m_i, q_i M_i)$.

Source: `quest` (arXiv 2406.10774), Algorithm 1 and Section 3.4.

Differs from the paper: none. Not here: bounds in fewer bits, which the paper names as possible.
"""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.tokens import Tokens


class PageBounds:
    """Bounds of pages, kept up as keys come.

    Args:
        size: S, keys of a page, 1 or more.

    Examples:
        >>> bounds = PageBounds(size=2)
        >>> bounds.append(torch.tensor([[[[1.0, -2.0], [0.0, 3.0], [5.0, 5.0]]]]))  # the second page has one key yet
        >>> bounds.least.tolist(), bounds.greatest.tolist()
        ([[[[0.0, -2.0], [5.0, 5.0]]]], [[[[1.0, 3.0], [5.0, 5.0]]]])
    """

    def __init__(self, size: int) -> None:
        self.size, self.keys = size, 0
        self._least, self._greatest = Tokens(), Tokens()

    @property
    def pages(self) -> int:
        """How many there are, the last one perhaps not full."""
        return self._least.length

    @property
    def least(self) -> Tensor:
        """m, `[rows, kv_heads, pages, head_dim]`."""
        return self._least.all()

    @property
    def greatest(self) -> Tensor:
        """M, the same shape."""
        return self._greatest.all()

    def append(self, k: Tensor) -> None:
        """Take in keys `[rows, kv_heads, time, head_dim]`: the last page is widened until it is full, then new ones begin."""
        room = min(-self.keys % self.size, k.shape[2])
        self.keys += k.shape[2]
        first, rest = k[:, :, :room], k[:, :, room:]
        if room:
            least, greatest = self.least[:, :, -1], self.greatest[:, :, -1]
            torch.minimum(least, first.amin(dim=2), out=least)
            torch.maximum(greatest, first.amax(dim=2), out=greatest)
        whole = rest.shape[2] // self.size * self.size
        if whole:
            pages = torch.unflatten(rest[:, :, :whole], 2, (-1, self.size))
            self._least.append(pages.amin(dim=3))
            self._greatest.append(pages.amax(dim=3))
        if rest.shape[2] > whole:
            self._least.append(rest[:, :, whole:].amin(dim=2, keepdim=True))
            self._greatest.append(rest[:, :, whole:].amax(dim=2, keepdim=True))

    def upper(self, query: Tensor, pages: int) -> Tensor:
        r"""The bound U of the first pages, of the product before it is divided by $\sqrt d$.

        Args:
            query: `[rows, heads, head_dim]`, one of each row; head h meets key head h // (heads / kv_heads).
            pages: how many.

        Returns:
            `[rows, heads, pages]`, float32 or wider.

        Examples:
            >>> bounds = PageBounds(size=2)
            >>> bounds.append(torch.tensor([[[[1.0, -2.0], [0.0, 3.0]]]]))
            >>> bounds.upper(torch.tensor([[[2.0, -1.0]]]), 1).item()  # 2 * 1 + -1 * -2; the keys themselves have 4 and -3
            4.0
        """
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = torch.unflatten(query.to(wide), 1, (self.least.shape[1], -1))  # [r, h, g, d]
        found = grouped.clamp(min=0) @ self.greatest[:, :, :pages].to(wide).mT
        return (found + grouped.clamp(max=0) @ self.least[:, :, :pages].to(wide).mT).flatten(1, 2)
