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
