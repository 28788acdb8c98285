r"""A weight held as two thin factors, as every low-rank method here stores it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight


class FactoredWeight(CompressedWeight):
    r"""$\hat W = AB$, held as its factors and multiplied one after the other.

    Args:
        left: A, `[out, rank]`.
        right: B, `[rank, in]`.

    Examples:
        >>> factored = FactoredWeight(torch.ones(6, 1), torch.ones(1, 20))
        >>> factored.dense().shape, factored.nbytes
        (torch.Size([6, 20]), 104)
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left.clone(memory_format=torch.contiguous_format))
        self.register_buffer("right", right.clone(memory_format=torch.contiguous_format))

    def dense(self) -> Tensor:
        """AB, `[out, in]`."""
        return self.left @ self.right

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        r"""$X B^\top A^\top + b$: `rank (in + out)` products a row instead of `in out`."""
        return F.linear(F.linear(inputs, self.right), self.left, bias)


class FactoredPlusRows(FactoredWeight):
    r"""$\hat W = AB + S$, where S is zero but for some rows, which are held densely.

    Args:
        left: A, `[out, rank]`.
        right: B, `[rank, in]`.
        rows: `[kept, in]`.
        index: which rows of S they are, `[kept]`.

    Examples:
        >>> rows, index = torch.ones(1, 4), torch.tensor([1])
        >>> FactoredPlusRows(torch.zeros(2, 1), torch.zeros(1, 4), rows, index).dense().tolist()
        [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    """

    rows: Tensor
    index: Tensor

    def __init__(self, left: Tensor, right: Tensor, rows: Tensor, index: Tensor) -> None:
        super().__init__(left, right)
        self.register_buffer("rows", rows.clone(memory_format=torch.contiguous_format))
        self.register_buffer("index", index.to(torch.int32))

    def dense(self) -> Tensor:
        """AB + S, `[out, in]`."""
        return super().dense().index_add(0, self.index, self.rows)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Three thin dense products; the third is added to the outputs whose rows remain."""
        return super().multiply(inputs, bias).index_add(-1, self.index, F.linear(inputs, self.rows))


class WholeWeight(CompressedWeight):
    """A weight as it was, where factors would hold no fewer numbers than it has."""

    whole: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("whole", weight.clone(memory_format=torch.contiguous_format))

    def dense(self) -> Tensor:
        """The weight, `[out, in]`."""
        return self.whole


def rank_for(out: int, columns: int, ratio: float) -> int:
    r"""Rank at which factors hold the share $1 - ratio$ of a weight's numbers, $\lfloor (1 - ratio)\,mn / (m + n) \rfloor$.

    At least 1: a matrix of rank 0 would forget the layer.

    Args:
        out: m.
        columns: n.
        ratio: share of the parameters removed, 0 to below 1.

    Raises:
        ValueError: the ratio is outside its range.

    Examples:
        >>> rank_for(4096, 4096, 0.2), rank_for(4096, 11008, 0.2), rank_for(2, 2, 0.9)
        (1638, 2388, 1)
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must be 0 (nothing is removed) to below 1 (all of it)")
    return max(1, int((1 - ratio) * out * columns / (out + columns)))


def check_size(ratio: float, rank: int | None) -> None:
    """Refuse a ratio or a rank outside its range.

    Raises:
        ValueError: it is.
    """
    rank_for(1, 1, ratio)
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1, or None to follow from ratio")


def project(weight: Tensor, basis: Tensor, rank: int) -> CompressedWeight:
    r"""A weight of which the first directions of its outputs are kept, $\hat W = Q_r Q_r^\top W$, as two factors.

    Every method here that is an SVD of a weighted matrix comes to this: with $WS = U \Sigma V^\top$, truncating and undoing
    the weight is $U_r \Sigma_r V_r^\top S^{-1} = U_r U_r^\top W S S^{-1} = U_r U_r^\top W$. Nothing has to be inverted, so
    that S may be singular: what it does not see is projected along with the rest.

    Args:
        weight: `[out, in]`.
        basis: Q, `[out, at least rank]`, orthonormal columns, the most important one first; in at least float32.
        rank: r, 1 or more.

    Returns:
        Factors $Q_r N$ and $N^{-1} Q_r^\top W$ in the weight's dtype, N diagonal and such that a column of the first is as
        long as the row of the second that it meets; the weight itself where factors would hold no fewer numbers.

    Examples:
        >>> weight = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> project(weight, torch.eye(2), 1).dense().tolist()
        [[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    out, columns = weight.shape
    if rank * (out + columns) >= out * columns:
        return WholeWeight(weight)
    kept = basis[:, :rank]
    right = kept.T @ weight.to(kept.dtype)
    size = right.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return FactoredWeight((kept * size).to(weight.dtype), (right / size[:, None]).to(weight.dtype))


def output_directions(weighted: Tensor) -> tuple[Tensor, Tensor]:
    r"""U and $\sigma$ of the singular value decomposition $U \Sigma V^\top$ of a weighted weight `[out, in]`.

    Returns:
        `[out, min(out, in)]` and `[min(out, in)]`, largest value first.
    """
    u, s, _ = torch.linalg.svd(weighted, full_matrices=False)
    return u, s
