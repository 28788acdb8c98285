r"""SVD-LLM: whiten a layer's inputs, so that each singular value left out is the output error that it causes.

Source: `svd-llm` (arXiv 2403.07378), Section 3.1 with the theorem that truncation loss is the singular value, and Section 3.2 of
its first version for the closed-form update; official code AIoT-MLSys-Lab/SVD-LLM@1c1009a99bea54c22c27a4dd5d9fba7116dc456b,
SVDLLM.py, `whitening` and `whitening_local_update`.

Differs from the paper: the second factor is computed as $U_r^\top W$, which $\Sigma_r V_r^\top S^{-1}$ is equal to, so that S
is not inverted. A Gram matrix that is singular (fewer rows than inputs, inputs that are always zero) gets the symmetric root
of its eigenvalues in place of a Cholesky factor, and the theorem keeps holding exactly; the official code adds
$10^{-6} - \lambda_{\min}$ to the diagonal, by which it does not. Factors are balanced (as in `factored.project`) instead of
taking $\Sigma_r^{1/2}$ each, which grows with the number of calibration tokens; their product is the same.
Over a model through `compress`, inputs are those that arrive when all layers before are compressed already. The paper whitens
with the inputs of the original model and then makes up for the difference by its update: this is `whiten_then_update`. Within
a block, too, its update sees inputs that come from compressed layers; in the official code they come from the original ones.

Not here: the fine-tuning of the factors, one after the other, with LoRA that later versions of the paper have in place of the
closed-form update; ranks that differ between layers (SVD-LLM V2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.compression.low_rank.factored import (
    FactoredWeight,
    WholeWeight,
    check_size,
    output_directions,
    project,
    rank_for,
)
from refimpl.compression.protocol import CompressedWeight, M, check_layer, compress


@dataclass(frozen=True, kw_only=True)
class SVDLLM:
    r"""Best approximation of rank r for the inputs that a layer meets, by truncation-aware whitening.

    Args:
        ratio: share of the parameters removed, 0 to below 1: $r = \lfloor (1 - ratio)\,mn / (m + n) \rfloor$, at least 1.
        rank: r itself, the same for all layers; `ratio` then counts for nothing.

    Examples:
        The second input is ten times larger than the first, and so its small weight is what is kept:

        >>> weight = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> inputs = torch.diag(torch.tensor([1.0, 10.0, 1.0, 1.0]))
        >>> SVDLLM(rank=1)(weight, inputs).dense().abs().tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """

    ratio: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        check_size(self.ratio, self.rank)

    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Factor a weight; the Gram matrix and its root are float64, the decomposition is in float32 or the weight's float64.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs; the official code takes 256 texts of 2048 tokens.

        Returns:
            Factors in the weight's dtype, or the weight where factors would be no smaller.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity.
        """
        if inputs is None:
            raise ValueError("SVDLLM needs the layer's inputs: pass `inputs`, or `calibration` to `compress`")
        check_layer(weight, inputs)
        return self._truncate(weight, gram(inputs))

    @torch.no_grad()
    def _truncate(self, weight: Tensor, covariance: Tensor) -> CompressedWeight:
        """The weight in the first r directions of its outputs on inputs of that Gram matrix."""
        out, columns = weight.shape
        rank = self.rank or rank_for(out, columns, self.ratio)
        if (self.rank is None and self.ratio == 0) or rank * (out + columns) >= out * columns:
            return WholeWeight(weight)
        basis, _ = output_directions(whitened(weight, covariance))
        return project(weight, basis, rank)


@torch.no_grad()
def gram(inputs: Tensor) -> Tensor:
    r"""$X^\top X$, `[in, in]`, float64, of inputs `[n, in]`: $XX^\top$ in the paper, where a token is a column.

    Raises:
        ValueError: all inputs are zero.
    """
    product = inputs.double().T @ inputs.double()
    if not product.diagonal().any():
        raise ValueError("inputs are all zero: nothing can be calibrated on them")
    return product


@torch.no_grad()
def whitened(weight: Tensor, covariance: Tensor) -> Tensor:
    r"""$WS$ with $SS^\top = X^\top X$, `[out, in]`, in float32 or the weight's float64 (Section 3.1).

    Its singular values are output errors: to leave out those beyond r moves the output by $(\sum_{i>r} \sigma_i^2)^{1/2}$.

    Args:
        weight: W, `[out, in]`.
        covariance: $X^\top X$, as `gram` gives it; singular or not.

    Examples:
        >>> whitened(torch.eye(2), torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64))).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0).sqrt()  # below 0 there is nothing but rounding
    product: Tensor = weight.double() @ root
    return product.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def update(weight: Tensor, compressed: CompressedWeight, inputs: Tensor) -> CompressedWeight:
    r"""The first factor refitted to the inputs that really arrive, $\min_A \|X'(W - AB)^\top\|_F$ (first version, Section 3.2).

    What these inputs say nothing about stays as it is.

    Args:
        weight: W, `[out, in]`, before compression.
        compressed: its factors A and B; a weight that was left whole is returned as it is.
        inputs: X', `[n, in]`, the layer's inputs behind compressed layers.

    Raises:
        ValueError: weight or inputs are misshapen, or hold NaN or infinity.
    """
    check_layer(weight, inputs)
    if not isinstance(compressed, FactoredWeight):
        return compressed
    left, right = compressed.left.double(), compressed.right.double()
    seen = gram(inputs) @ right.T  # [in, r]
    correction = (weight.double() - left @ right) @ seen @ torch.linalg.pinv(right @ seen, hermitian=True)
    return FactoredWeight((left + correction).to(weight.dtype), compressed.right)


def whiten_then_update(model: M, calibration: Iterable[Any], method: SVDLLM) -> M:
    """The paper's procedure over a model: truncate all layers by the inputs they had, then update them in order.

    The Gram matrices of all layers are held at once.

    Args:
        model: any module with linear layers; left unchanged.
        calibration: batches, as `compress` takes them; not empty.
        method: how far to go.

    Returns:
        A copy in evaluation mode.

    Raises:
        ValueError: there is no calibration data, or what `compress` raises.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Tanh(), torch.nn.Linear(9, 8))
        >>> text = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        >>> small = whiten_then_update(model, [text], SVDLLM(ratio=0.5))
        >>> [tuple(held.shape) for held in small[0].compressed.buffers()]
        [(9, 2), (2, 8)]
    """
    covariances: list[Tensor] = []

    def watch(weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        if inputs is None:
            raise ValueError("SVDLLM needs texts: pass `calibration`")
        covariances.append(gram(inputs))
        return WholeWeight(weight)

    batches = list(calibration) if not isinstance(calibration, Tensor) else calibration
    compress(model, watch, batches)
    waiting = iter(covariances)  # the second run visits layers in the same order

    def truncate_and_update(weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        assert inputs is not None
        return update(weight, method._truncate(weight, next(waiting)), inputs)

    return compress(model, truncate_and_update, batches)
