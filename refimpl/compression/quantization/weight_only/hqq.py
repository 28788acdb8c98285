r"""HQQ: zero points that make most errors small and let a few be large, found without data by half-quadratic splitting.

Source: `hqq` (mobiusml.github.io/hqq_blog), "Method": the problem, its two steps and their solutions; official code
mobiusml/hqq@e0b1d00e095653359da9de1d7dbb35a994aa6b96, hqq/core/optimize.py (`shrink_lp_op`, `optimize_weights_proximal_v2` with
its defaults) and quantize.py (`Quantizer.quantize`, `hqq_base_quant_config`: groups of 64 along a channel, and a start that is rounded
at 4 bits).

Differs from the paper: the zero points of least mean error are kept, as in the official `optimize_weights_proximal_v2`, also after the
last round; the official default goes one step on from the first that is worse. Codes are those of the scale and zero point as stored. A step is no
smaller than the smallest normal number of `scale_dtype` (official: 5e-5). A group of weights that lie on one side and far from 0
for its width has its range widened to 0, since its zero point would not fit in 16 bits; the official code takes a step of 1
for groups narrower than 1e-4. Where the group size does not divide a channel, its last group is shorter; the official code refuses.

Not here: groups across channels (`axis=0`); quantized scales and zero points; the search for scales; HQQ+, with its adapters; kernels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.protocol import check_layer
from refimpl.compression.quantization.affine import dequantize, from_groups, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.model.bits import unpack

BETA, KAPPA = 10.0, 1.01  # weight of the quadratic term at the beginning, and its growth with each round
FAR = 1024  # levels between 0 and the nearer end of a range, from which 16 bits would round a zero point to integers


@dataclass(frozen=True, kw_only=True)
class HQQ:
    r"""Half-quadratic quantization.

    Args:
        bits: 1 to 8.
        group_size: neighbours in a channel that share a scale and a zero point; None is the whole channel.
        norm: p of the error $\|W - \hat W\|_p^p$, above 0 and up to 1.
        rounds: at most so many; 0 leaves the zero points of the range.
        scale_dtype: what scales and zero points are stored in.

    Examples:
        The grid need not have 0 for a level. Two bytes hold up to eight codes of 2 bits, a scale and a zero point take two each:

        >>> packed = HQQ(bits=2, group_size=4)(torch.tensor([[0.25, 1.25, 2.25, 3.25]]))
        >>> packed.dense().tolist(), packed.real_zero.tolist(), packed.nbytes
        ([[0.25, 1.25, 2.25, 3.25]], [-0.25], 6)
    """

    needs_inputs: ClassVar[bool] = False

    bits: int = 4
    group_size: int | None = 64
    norm: float = 0.7
    rounds: int = 20
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1, or None for whole channels")
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm={self.norm} must be above 0 and at most 1; the official code uses 0.7")
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds} must be 0 or more; the official code uses 20")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> "RealZeroWeight":  # noqa: ARG002 - the protocol passes it
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            Packed codes, scales, and zero points that are no integers; `dense()` has the weight's dtype.

        Raises:
            ValueError: the weight is no matrix, is empty, holds NaN or infinity, or is too large for `scale_dtype`.
        """
        check_layer(weight)
        size = weight.shape[1] if self.group_size is None else min(self.group_size, weight.shape[1])
        groups = to_groups(weight.float(), "group", size)
        weights = torch.ones_like(weight, dtype=torch.float32)
        present = to_groups(F.pad(weights, (0, -weight.shape[1] % size)), "group", size)  # 0 where a group is filled up
        scale, zero = real_grid(groups, self.bits, scale_dtype=self.scale_dtype)
        if self.bits == 4:
            zero = zero.round()
        zero = fitted_zeros(groups, scale.float(), zero, self.bits, present=present, norm=self.norm, rounds=self.rounds)
        zero = zero.to(self.scale_dtype)
        return RealZeroWeight(
            real_codes(groups, scale.float()[:, None], zero.float()[:, None], self.bits).to(torch.uint8),
            scale,
            zero,
            bits=self.bits,
            granularity="group",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
        )


def real_grid(groups: Tensor, bits: int, *, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""The grid from a group's least weight to its greatest: $s = (\max - \min) / (2^{bits} - 1)$ and $z = -\min / s$.

    Args:
        groups: `[groups, size]`.
        bits: 1 to 8.
        scale_dtype: what scales are stored in.

    Returns:
        scale `[groups]`, in `scale_dtype`, positive; zero `[groups]`, float32, real.

    Raises:
        ValueError: a range is wider than `scale_dtype` can express.

    Examples:
        >>> real_grid(torch.tensor([[1.0, 2.5], [-1.0, 2.0]]), 2, scale_dtype=torch.float32)
        (tensor([0.5000, 1.0000]), tensor([-2.,  1.]))
    """
    low, high = groups.aminmax(dim=1)
    far = torch.maximum(low, -high) * (2**bits - 1) > FAR * (high - low)
    low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
    scale = ((high - low) / (2**bits - 1)).to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"a range of {float((high - low).max()):g} needs a scale beyond {scale_dtype}; use scale_dtype=torch.float32"
        )
    return scale, -low / scale.float()


def fitted_zeros(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    *,
    present: Tensor | None = None,
    norm: float = 0.7,
    rounds: int = 20,
) -> Tensor:
    r"""Zero points of least error, by alternating the two steps of the half-quadratic problem.

    With $x = W - s (W_q - z)$ the error, round by round: $W_e = \operatorname{shrink}(x)$, the part of it that is given up;
    then $z = \langle W_q - (W - W_e) / s \rangle$, a mean over the group, the least squares for what is left. It ends when the mean of
    $|x|$ over all groups falls no more. Errors below $\beta^{-1/(2-p)}$, 0.17 at the beginning, are not given up at all: on weights of the
    usual size, a round is the least-squares fit alone.

    Args:
        groups: `[groups, size]`, float32; left unchanged.
        scale: `[groups]`, float32.
        zero: `[groups]`, float32, to begin with.
        bits: 1 to 8.
        present: `[groups, size]`, 1 for weights and 0 for what only fills a group up; None: all are weights.
        norm: p, up to 1.
        rounds: at most so many.

    Returns:
        `[groups]`, float32, of all that were tried the ones of least mean error.

    Examples:
        Codes 0, 1, 2, 3, 3: the outlier, which is clipped, draws the mean of the errors; the shrunk one stays at the others'.

        >>> groups, one = torch.tensor([[0.2, 1.2, 2.2, 3.2, 9.0]]), torch.ones(1)
        >>> round(float(fitted_zeros(groups, one, 0 * one, 2)), 1)
        -0.2
    """
    present = torch.ones_like(groups) if present is None else present
    scale, count, beta = scale[:, None], present.sum(dim=1, keepdim=True), BETA
    tried, best, least = zero[:, None], zero[:, None], torch.inf
    for _ in range(rounds + 1):
        codes = real_codes(groups, scale, tried, bits)
        error = groups - (codes - tried) * scale
        mean = float((error.abs() * present).sum() / count.sum())
        if mean >= least:
            break
        best, least = tried, mean
        given_up = shrink(error, beta, norm)
        tried = ((codes - (groups - given_up) / scale) * present).sum(dim=1, keepdim=True) / count
        beta *= KAPPA
    return best[:, 0]


def real_codes(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    r"""$W_q = \operatorname{round}(W / s + z)$, float32 holding integers; the zero point is added before it is rounded.

    Args:
        groups: `[groups, size]`, float32.
        scale: `[groups, 1]`, float32.
        zero: `[groups, 1]`, float32.
        bits: 1 to 8.

    Examples:
        >>> real_codes(torch.tensor([[0.4, 1.4]]), torch.ones(1, 1), torch.full((1, 1), 0.3), 2).tolist()
        [[1.0, 2.0]]
    """
    return (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    r"""$\operatorname{sign}(x) \max(0, |x| - |x|^{p-1} / \beta)$: soft thresholding for p = 1; for p below 1 large ones shrink less.

    Args:
        x: any shape.
        beta: above 0.
        norm: p, above 0 and up to 1.

    Examples:
        >>> shrink(torch.tensor([-1.0, 4.0, 0.1]), 2.0, 0.5).tolist()
        [-0.5, 3.75, 0.0]
    """
    size = x.abs()
    return (size - size.pow(norm - 1) / beta).clamp_(min=0).mul_(x.sign())


class RealZeroWeight(QuantizedWeight):
    """Packed codes with a scale and a zero point for each group, where zero points are real numbers.

    Args:
        codes: as in `QuantizedWeight`.
        scale: as in `QuantizedWeight`.
        zero: `[groups]`, floating point, stored as it is.
        **about: as in `QuantizedWeight`.
    """

    real_zero: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, **about: object) -> None:
        super().__init__(codes, scale, None, **about)  # type: ignore[arg-type]
        self.register_buffer("real_zero", zero)

    def dense(self) -> Tensor:
        r"""$\hat W = (Q - Z) s$, `[out, in]`."""
        rows, columns = self.shape
        codes = unpack(self.codes, self.bits, rows * columns).view(rows, columns)
        groups = to_groups(codes, self.granularity, self.group_size)
        return from_groups(dequantize(groups, self.scale, self.real_zero), self.shape).to(self.dtype)
