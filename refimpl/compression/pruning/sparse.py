r"""Which weights of a layer go, and how those that stay are stored in fewer bytes.

A sparsity is either a share of the weights, removed wherever scores are lowest, or a pattern `"N:M"`: of every M neighbours in a
row, N stay. Where M does not divide a row, the row is padded with zeros as NVIDIA's code does
(apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d, apex/contrib/sparsity/sparse_masklib.py), so that its last group, of r weights,
keeps the smaller of N and r.

Examples:
    >>> weight = torch.tensor([[3.0, -1.0, 2.0, -4.0]], dtype=torch.bfloat16)
    >>> kept = ~lowest(weight.abs(), 2)
    >>> free, pattern = sparse_form(weight, kept), sparse_form(weight, kept, Pattern(2, 4))
    >>> free.dense().tolist(), torch.equal(free.dense(), pattern.dense())
    ([[3.0, 0.0, 0.0, -4.0]], True)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight
from refimpl.model.bits import pack, unpack


class Pattern(NamedTuple):
    """So many weights stay of every so many neighbours in a row: `Pattern(2, 4)` is 2:4."""

    kept: int
    of: int


def pattern_of(sparsity: float | str) -> Pattern | None:
    """The pattern that a sparsity names, None for a share of the weights.

    Raises:
        ValueError: the share is not from 0 to below 1, or the text is no pattern with 1 <= N < M <= 256.

    Examples:
        >>> pattern_of("2:4"), pattern_of(0.5)
        (Pattern(kept=2, of=4), None)
    """
    if not isinstance(sparsity, str):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity} must be 0 (no weight is removed) to below 1 (all are), or '2:4'")
        return None
    kept, colon, of = sparsity.partition(":")
    if not (colon and kept.isdecimal() and of.isdecimal() and 1 <= int(kept) < int(of) <= 256):
        raise ValueError(f"sparsity={sparsity!r} must be 'N:M' with 1 <= N < M <= 256, as '2:4': N of every M stay")
    return Pattern(int(kept), int(of))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores along the last dimension; of equal ones, the earlier go first.

    Args:
        scores: `[..., n]`, no NaN.
        count: 0 to n.

    Examples:
        >>> lowest(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=-1, keepdim=True).values
    chosen = scores <= limit
    if int(chosen.sum()) > count * (scores.numel() // scores.shape[-1]):  # more equal the limit than there is room for
        below, ties = scores < limit, scores == limit
        chosen = below | (ties & (ties.cumsum(dim=-1) <= count - below.sum(dim=-1, keepdim=True)))
    return chosen


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the M - N lowest scores of every M neighbours in a row; of equal ones, the earlier go first.

    Args:
        scores: `[rows, columns]`, no NaN.
        pattern: N:M; where M does not divide the columns, the last group loses what it has beyond N.

    Examples:
        >>> lowest_of_groups(torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0, 7.0, 6.0]]), Pattern(2, 4)).int().tolist()
        [[0, 1, 0, 1, 1, 0, 0]]
    """
    rows, columns = scores.shape
    groups = _whole_groups(scores, pattern.of, -float("inf")).reshape(-1, pattern.of)
    members = groups.T.contiguous()  # [M, groups]: long rows are compared, not groups of four
    better = torch.zeros_like(members, dtype=torch.uint8)  # how many of its group each one yields to
    for i, one in enumerate(members):
        better[:i] += one >= members[:i]
        better[i + 1 :] += one > members[i + 1 :]
    return (better >= pattern.kept).T.reshape(rows, -1)[:, :columns]


def _whole_groups(rows: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Rows, filled up with a value where their length is no multiple of a group's; the same tensor where it is."""
    return F.pad(rows, (0, -rows.shape[1] % size), value=value) if rows.shape[1] % size else rows


def sparse_form(weight: Tensor, kept: Tensor, pattern: Pattern | None = None) -> CompressedWeight:
    """A weight with zeros where `kept` is false, in the form that its pattern allows.

    Args:
        weight: `[out, in]`; read where `kept` is true.
        kept: `[out, in]`, bool.
        pattern: what `kept` follows; None for zeros anywhere.
    """
    return SparseWeight(weight, kept) if pattern is None else PatternWeight(weight, kept, pattern)


class SparseWeight(CompressedWeight):
    """The weights that stay, one after the other, and one bit for each place that says whether one stays there.

    At a sparsity s a weight of b bits takes `(1 - s) b + 1` bits a place: fewer than b where s is more than 1 / b.

    Args:
        weight: `[out, in]`; read where `kept` is true.
        kept: `[out, in]`, bool.

    Examples:
        Four bytes for two weights in 16 bits, one for the four places:

        >>> SparseWeight(torch.ones(1, 4).half(), torch.tensor([[True, False, False, True]])).nbytes
        5
    """

    values: Tensor
    places: Tensor

    def __init__(self, weight: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        self.register_buffer("values", weight[kept])
        self.register_buffer("places", pack(kept.flatten().to(torch.uint8), 1))

    def dense(self) -> Tensor:
        """`[out, in]`, zero where nothing is kept."""
        rows, columns = self.shape
        kept = unpack(self.places, 1, rows * columns).bool().view(self.shape)
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        return dense.masked_scatter_(kept, self.values)


class PatternWeight(CompressedWeight):
    """The N weights that stay of every M neighbours in a row, and the place of each in its group, in `log2(M)` bits.

    Args:
        weight: `[out, in]`; read where `kept` is true.
        kept: `[out, in]`, bool; true N times in every group, or in all of the last one where that is shorter than N.
        pattern: N:M.

    Raises:
        ValueError: `kept` does not follow the pattern.

    Examples:
        Four bytes for two weights in 16 bits; a place takes two bits, and up to four places take a byte:

        >>> kept = torch.tensor([[True, False, False, True]]).repeat(2, 1)
        >>> PatternWeight(torch.ones(2, 4).half(), kept, Pattern(2, 4)).nbytes
        10
    """

    values: Tensor
    places: Tensor

    def __init__(self, weight: Tensor, kept: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.pattern, self.shape = tuple(pattern), (weight.shape[0], weight.shape[1])
        columns, (n, m) = weight.shape[1], pattern
        self.bits = (m - 1).bit_length()
        kept = _whole_groups(kept, m)
        if 0 < columns % m < n:  # filled up by zeros of the padding
            kept[:, columns : columns - columns % m + n] = True
        groups, found = kept.numel() // m, kept.flatten().nonzero().flatten()
        starts = m * torch.arange(groups, device=kept.device)[:, None]
        places = found.view(groups, n) - starts if len(found) == groups * n else starts - 1
        if int(places.min()) < 0 or int(places.max()) >= m:
            raise ValueError(f"kept must be true {n} times in every {m} neighbours of a row")
        self.register_buffer("values", _whole_groups(weight, m).flatten()[found])
        self.register_buffer("places", pack(places.flatten().to(torch.uint8), self.bits))

    def dense(self) -> Tensor:
        """`[out, in]`, zero where nothing is kept."""
        rows, columns = self.shape
        n, m = self.pattern
        places = unpack(self.places, self.bits, self.values.numel()).view(-1, n).long()
        groups = torch.zeros(len(places), m, dtype=self.values.dtype, device=self.values.device)
        return groups.scatter_(1, places, self.values.view(-1, n)).view(rows, -1)[:, :columns].contiguous()
