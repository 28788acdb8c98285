r"""Which of the last queries have marked a token, in one bit each.

Query number i has bit i mod 8 of byte i // 8, and the bytes come round again: they hold the last `window` queries and up to seven
more, which are not counted. Numbers are positions in the text; a token that is new has no marks.
"""

import torch
from torch import Tensor

from refimpl.model.bits import pack


def ring_bytes(window: int) -> int:
    """Bytes in which the last `window` queries always have their bits: the newest byte may hold a single one.

    Examples:
        >>> [ring_bytes(window) for window in (1, 2, 9, 10, 400)]
        [1, 2, 2, 3, 51]
    """
    return (window + 6) // 8 + 1


def mark(ring: Tensor, marks: Tensor, first: int) -> None:
    """Write the marks of queries that follow each other, over those of queries a round ago.

    Args:
        ring: `[..., tokens, bytes]`, uint8, written to.
        marks: `[..., time, tokens]`, bool.
        first: number of the first of these queries; all before it are written, but for those beyond the window.

    Examples:
        >>> ring = torch.zeros(1, 1, dtype=torch.uint8)
        >>> mark(ring, torch.tensor([[True], [False], [True]]), first=5)
        >>> ring.item() == 2**5 + 2**7, count_marks(ring, last=7, window=2).tolist()
        (True, [1])
    """
    time = marks.shape[-2]
    done = 0
    while done < time:
        byte, bit = divmod(first + done, 8)
        count = min(8 - bit, time - done)
        cell = ring[..., byte % ring.shape[-1]]
        cell &= (1 << bit) - 1
        for i in range(count):
            cell |= marks[..., done + i, :].to(torch.uint8) << bit + i
        done += count


def count_marks(ring: Tensor, last: int, window: int) -> Tensor:
    """How many of the queries `last - window + 1` to `last` have marked each token.

    Args:
        ring: `[..., tokens, bytes]`, uint8, of `ring_bytes(window)` bytes.
        last: number of the last query that `mark` was told of.
        window: queries that count.

    Returns:
        `[..., tokens]`, int64.
    """
    counted = torch.zeros(8 * ring.shape[-1], dtype=torch.uint8, device=ring.device)
    counted[torch.arange(max(0, last - window + 1), last + 1, device=ring.device) % len(counted)] = 1
    ones = ring & pack(counted, 1)
    for shift, mask in ((1, 0x55), (2, 0x33), (4, 0x0F)):  # sums of neighbouring bits, pairs, fours
        ones = (ones & mask) + (ones >> shift & mask)
    return ones.sum(dim=-1, dtype=torch.int64)
