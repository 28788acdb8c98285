r"""Truncated SVD: a weight as the product of two thin factors, the nearest there is of that rank.

Source: `svd-restructuring` (one linear layer becomes two); `eckart-young` for the optimum; the rank of a ratio as in
`svd-llm` (arXiv 2403.07378), Section 4.2, which has this method as a baseline, and its official code,
AIoT-MLSys-Lab/SVD-LLM@0e3166628f9a8a16c47daa9dfe2e099c787ecea5, SVDLLM.py.

Differs from the paper: singular values are split evenly over both factors (the paper gives all of them to the second), which
changes no product. No retraining follows.

Not here: weighting by data or by gradients (`asvd`, `svd_llm`, `fwsvd`); a rank for each layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refimpl.compression.low_rank.factored import FactoredWeight, WholeWeight, check_size, rank_for
from refimpl.compression.protocol import CompressedWeight, check_layer


@dataclass(frozen=True, kw_only=True)
class SVD:
    r"""Best approximation of rank r, without data.

    Factors of rank r hold $r(m + n)$ numbers, and the weight $mn$. Where that is no gain, from $r = mn/(m + n)$ on, the
    weight is kept as it is, exact and at its own size; so is every weight at `ratio=0`.

    Args:
        ratio: share of the parameters removed, 0 to below 1: $r = \lfloor (1 - ratio)\,mn / (m + n) \rfloor$, at least 1.
        rank: r itself, the same for all layers; `ratio` then counts for nothing.

    Examples:
        Of the two parts of this weight, the larger is kept:

        >>> weight = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> small = SVD(rank=1)(weight)
        >>> small.dense().abs().tolist(), small.nbytes, weight.nbytes
        ([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], 24, 32)
    """

    needs_inputs: ClassVar[bool] = False

    ratio: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        check_size(self.ratio, self.rank)

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:  # noqa: ARG002 - the protocol passes it
        """Factor a weight; the decomposition is in float32, or in float64 for a weight in it.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            Factors in the weight's dtype, or the weight where factors would be no smaller.

        Raises:
            ValueError: the weight is no matrix, is empty, or holds NaN or infinity.
        """
        check_layer(weight)
        out, columns = weight.shape
        rank = self.rank or rank_for(out, columns, self.ratio)
        if (self.rank is None and self.ratio == 0) or rank * (out + columns) >= out * columns:
            return WholeWeight(weight)
        left, right = truncate(weight.to(torch.promote_types(weight.dtype, torch.float32)), rank)
        return FactoredWeight(left.to(weight.dtype), right.to(weight.dtype))


def truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Factors $A = U_r \Sigma_r^{1/2}$, `[out, rank]`, and $B = \Sigma_r^{1/2} V_r^\top$, `[rank, in]`, of a weight.

    The squared error $\|W - AB\|_F^2$ is the sum of the squared singular values left out (Eckart and Young).
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
