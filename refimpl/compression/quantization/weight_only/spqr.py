r"""SpQR: tiny groups whose scales and zero points are quantized too, and the weights that are hardest to round kept in 16 bits.

Source: `spqr` (arXiv 2306.03078), Section 3 for sensitivities, Section 4 with Algorithm 1 (`fit_statistics`, `outliers`, the sweep) and
Section 4.2 for the format; official code Vahe1994/SpQR@543d10e56f921e5eeb10d5f0aaaccd30b6662d0e, spqr_engine.py and
quant_groups.py, whose README gives the threshold.

Differs from the paper: where the official code differs from Algorithm 1, it is followed: a group's likely outliers stand at the mean
of the others while its grid is fitted (in Algorithm 1 at 0), and which weights are outliers in the end is decided one by one, when
their column is rounded, on the grid that was fitted. A second-level grid is stored as its step and its least value instead of step
and zero point, the same map, since the zero point overflows 16 bits where the scales of a group hardly differ. A group all of whose
weights lie on one side, far from 0 for its width, has its range widened to 0; the official code takes [-1, 1] for a constant group.
Groups count every update so far, as in `gptq`. The damping is the default of the official code, 0.01; its README calls it with 1.0.
A weight of one row, whose columns have no variance, takes their squares for the threshold.

Not here: the kernel; other orders of the columns; other sizes of second-level groups (the paper also takes 64); the variant without
the leave-one-out test (`simplified_outliers`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.hessian import Sweep, inverse_factor, layer_hessian
from refimpl.compression.quantization.bilevel import BilevelWeight, Statistics
from refimpl.compression.quantization.outliers import Outliers

FAR = 1024  # a zero point beyond this many levels is no use to a neighbour, nor exact in 16 bits


@dataclass(frozen=True, kw_only=True)
class SpQR:
    r"""Sparse-quantized representation.

    Args:
        bits: 1 to 8, of a weight's code.
        statistics_bits: 1 to 8, of the code of a scale or a zero point.
        group_size: neighbours in a channel, in the order of visits, that share a scale and a zero point.
        threshold: $\tau$; a weight whose rounding costs more than this share of the mean of what zeroing a weight would cost
            (its column's variance over $[U_{jj}]^2$) is an outlier; infinity keeps none.
        act_order: visit columns in order of falling $H_{jj}$; the order is stored.
        damping: share of the mean of $H$'s diagonal that is added to it, 0 or more.

    Examples:
        >>> weight = torch.tensor([[0.0, 10.0, 20.0, 30.0], [0.0, 10.0, 20.0, 300.0]])
        >>> packed = SpQR(bits=2, group_size=4, threshold=0.05)(weight, torch.eye(4))
        >>> packed.outliers.value.tolist(), packed.dense().round().tolist()
        ([300.0], [[0.0, 10.0, 20.0, 30.0], [0.0, 7.0, 20.0, 300.0]])
    """

    bits: int = 3
    statistics_bits: int = 3
    group_size: int = 16
    threshold: float = 0.2
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("bits", "statistics_bits"):
            if not 1 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 to 8")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; the paper uses 16")
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold} must be positive; the official code suggests 0.2")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; the official code uses 0.01")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> BilevelWeight:
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs.

        Returns:
            Packed codes of weights and statistics, outliers in 16 bits; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                weight is too large for 16 bits; the damping is too small for these inputs.
        """
        hessian, dead = layer_hessian("SpQR", weight, inputs)
        energy = hessian.diagonal()
        order = (
            energy.argsort(descending=True, stable=True)
            if self.act_order
            else torch.arange(len(energy)).to(dead.device)
        )
        factor = inverse_factor(hessian, dead, self.damping, order)
        columns = weight.float().masked_fill(dead, 0)[:, order].T.contiguous()
        half = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
        codes, scales, zeros, outlier = self._sweep(columns, factor, half)
        back = order.argsort()
        return BilevelWeight(
            codes,
            scales,
            zeros,
            Outliers(columns.T[:, back], outlier[:, back], half),
            order if self.act_order else None,
            bits=self.bits,
            group_size=self.group_size,
            dtype=weight.dtype,
        )

    def _sweep(
        self, columns: Tensor, factor: Tensor, half: torch.dtype
    ) -> tuple[Tensor, Statistics, Statistics, Tensor]:
        """Algorithm 1: codes `[out, in]`, scales and zero points of `[groups, out]`, and the mask of outliers `[out, in]`.

        `columns`, `[in, out]`, hold what the weights became at the end.
        """
        n, size, deviation = len(columns), self.group_size, factor.diagonal()
        spread = columns.var(dim=1) if columns.shape[1] > 1 else columns.square().mean(dim=1)
        limit = self.threshold * (spread / deviation.square()).mean()
        codes, masks, fitted = [], [], []
        for i, sweep in enumerate(Sweep(columns, factor)):
            if i % size == 0:
                group = slice(i, min(i + size, n))
                fitted.append(self._fit(sweep.current(group).T, deviation[group], limit))
                scale, zero = (statistic.values() for statistic in fitted[-1])
            w = sweep.column
            rounded, _ = self._round(w, scale, zero)
            mask = ((w - rounded) / deviation[i]).square() > limit
            rounded, code = self._round(w.masked_fill(mask, 0), scale, zero)
            codes.append(code.to(torch.uint8))
            masks.append(mask)
            sweep.settle(torch.where(mask, w.to(half).float(), rounded))
        scales, zeros = (Statistics.stack(parts) for parts in zip(*fitted, strict=True))
        return torch.stack(codes, dim=1), scales, zeros, torch.stack(masks, dim=1)

    def _round(self, w: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Values and codes of numbers on a grid whose zero point is no integer."""
        code = (w / scale.clamp(min=1e-9) + zero).round_().clamp_(0, 2**self.bits - 1)
        return (code - zero) * scale, code

    def _fit(self, group: Tensor, deviation: Tensor, limit: Tensor) -> tuple[Statistics, Statistics]:
        """Quantized scales and zero points of a group, `[out, size]`, as its likely outliers leave it."""
        likely = outlier_gain(group, deviation, self.bits) > limit
        others = (~likely).sum(dim=1, keepdim=True).clamp(min=1)
        mean = group.masked_fill(likely, 0).sum(dim=1, keepdim=True) / others
        low, high = torch.where(likely, mean, group).aminmax(dim=1)
        scale, zero = first_level(low, high, self.bits)
        return Statistics.of(scale, self.statistics_bits), Statistics.of(zero, self.statistics_bits)


def first_level(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid from `low` to `high`, any shape; neither is rounded.

    Examples:
        >>> first_level(torch.tensor(-1.0), torch.tensor(0.5), 2)
        (tensor(0.5000), tensor(2.))
    """
    far = torch.maximum(low, -high) * (2**bits - 1) > FAR * (high - low)  # 0 is that far beyond the nearer end
    low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.where(scale > 0, -low / scale, 0)


def outlier_gain(group: Tensor, deviation: Tensor, bits: int) -> Tensor:
    r"""By how much a group's error falls if a weight is left out, `[out, size]` (Algorithm 1, `outliers`).

    The error is the sum of $(w - \operatorname{quant}(w))^2 / U_{jj}^2$. Only leaving out the least or the greatest weight moves
    the grid; each other one saves its own error.

    Args:
        group: `[out, size]`.
        deviation: $U_{jj}$, `[size]`.
        bits: of the grid.

    Examples:
        Without 9 the levels are 0, 1, 2 and 3:

        >>> outlier_gain(torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]]), torch.ones(5), 2).round(decimals=2)
        tensor([[0.5600, 1.0000, 1.0000, 0.0000, 2.0000]])
    """

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = (x[:, None] for x in first_level(low, high, bits))
        code = (group / scale.clamp(min=1e-9) + zero).round_().clamp_(0, 2**bits - 1)
        return ((group - (code - zero) * scale) / deviation).square()

    if group.shape[1] == 1:
        return torch.zeros_like(group)
    ordered, at = group.sort(dim=1)
    own = errors(ordered[:, 0], ordered[:, -1])
    gain = own.clone()
    for place, low, high in ((at[:, :1], ordered[:, 1], ordered[:, -1]), (at[:, -1:], ordered[:, 0], ordered[:, -2])):
        without = errors(low, high).scatter(1, place, 0).sum(dim=1, keepdim=True)
        gain.scatter_(1, place, own.sum(dim=1, keepdim=True) - without)
    return gain
