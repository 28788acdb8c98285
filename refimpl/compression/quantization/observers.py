r"""Observers: which range a grid shall cover, so that few numbers are clipped and the others get a small step.

An observer looks at numbers and returns a range, its least and its greatest value, 0 among them. Every grid here takes one: that of
weights, `affine_grid(*range, bits, …)`; that of activations, `Activations.grid(*range)`; and a static grid, `reach=range` of
`integer_weight`. What the observer saw may be the weight itself, or activations of calibration data.

    the range itself      `values.aminmax(dim=-1)`: nothing is clipped
    `mse_range`           the share of the range that moves the numbers least; `best_range` for any other quantizer
    `kl_range`            the range whose histogram loses least information, in nats

Source: `ocs` (arXiv 1901.09504), on clipping; official code cornell-zhang/dnn-quant-ocs@ca3a413c73850b4e5d7aac558f5856b44060e39c,
distiller/quantization/clip.py, `find_clip_mmse`, for the shares 0.01 to 0.99 of the range; `tensorrt-int8-2017`, "Entropy Calibration -
pseudocode", for the divergence, and what the slides leave open from NVIDIA/TensorRT@35477bdb94eab72862ffbdf66d4419e408bef45f,
tools/pytorch-quantization/pytorch_quantization/calib/histogram.py, `_compute_amax_entropy`: which bins make a level where their number
is no multiple, the whole range as a candidate, the widest of equal candidates, and a first bin that counts what the second does, so
that zeros, which every grid keeps, do not matter.

Differs from the paper: `mse_range` takes the errors of the numbers themselves, where `ocs` takes those of 201 bins; and the whole range
is among its candidates. The threshold of `kl_range` is that of the slides, $(i + 1/2) \Delta$, but never beyond the largest magnitude.

Not here: percentiles; averages over batches; 256 levels for numbers without negative ones.

Examples:
    A weight's grid, and a static grid of activations with a tail, both of 8 bits:

    >>> from refimpl.compression.quantization.activations import Activations, integer_weight
    >>> weight = torch.tensor([[0.5, -0.25, 1.0]])
    >>> scale, zero = affine_grid(*mse_range(weight, 8), 8, symmetric=False, scale_dtype=torch.float32)
    >>> inputs = torch.cat([torch.special.ndtri(torch.linspace(0.001, 0.999, 2000)), torch.tensor([40.0])])
    >>> low, high = kl_range(inputs, 8)
    >>> held = integer_weight(weight, Activations(scope="static"), reach=(low, high))
    >>> float(high), float(held.input_scale)
    (3.115234375, 0.024529404938220978)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.quantization.affine import Granularity, affine_grid, nearest, to_groups
from refimpl.compression.quantization.divergence import AT_ONCE, BINS, kl_bins, magnitudes

Range = tuple[Tensor, Tensor]


def best_range(
    values: Tensor,
    rounded: Callable[[Tensor, Tensor], Tensor],
    *,
    norm: float = 2.0,
    steps: int = 100,
    least: int = 1,
) -> Range:
    r"""The share of a range with which a quantizer errs least, $\operatorname{argmin}_c \sum_i |x_i - Q_c(x_i)|^p$.

    Args:
        values: `[..., n]`, each row for itself.
        rounded: maps a range, `[...]` twice, to what the quantizer with that range makes of the values.
        norm: the exponent p.
        steps: shares are 1, 1 - 1 / steps, and so on; the larger of two that are equally good is taken.
        least: the last share is least / steps.

    Returns:
        Least and greatest value of the range, `[...]`, float32; 0 lies between them.

    Raises:
        ValueError: there are no values, or they hold NaN or infinity.

    Examples:
        With the levels -a and a, the mean magnitude is best:

        >>> values = torch.tensor([1.0, -1.0, 1.0, -5.0])
        >>> best_range(values, lambda low, high: torch.where(values < 0, low, -low), steps=10)
        (tensor(-2.), tensor(0.4000))
    """
    _check(values)
    values = values.float()
    low, high = _range(values)

    def error(low: Tensor, high: Tensor) -> Tensor:
        return rounded(low, high).sub(values).abs_().pow_(norm).sum(dim=-1)

    found, lowest = (low, high), error(low, high)
    for i in range(1, steps - least + 1):
        tried = (1 - i / steps) * low, (1 - i / steps) * high
        moved = error(*tried)
        better = moved < lowest
        found = torch.where(better, tried[0], found[0]), torch.where(better, tried[1], found[1])
        lowest = torch.minimum(moved, lowest)
    return found


def mse_range(
    values: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    norm: float = 2.0,
    steps: int = 100,
    least: int = 1,
) -> Range:
    """The share of the range with which `affine_grid` errs least.

    Args:
        values: `[..., n]`, each row for itself.
        bits: 1 to 8.
        symmetric: the grid is symmetric.
        scale_dtype: what scales are stored in.
        norm: as in `best_range`.
        steps: as in `best_range`.
        least: as in `best_range`.

    Returns:
        As `best_range`.

    Raises:
        ValueError: bits outside 1 to 8; there are no values, or they hold NaN or infinity; a range is wider than `scale_dtype` can
            express.

    Examples:
        Levels 0, c/3, 2c/3 and c: $99 (c/3 - 1)^2 + (12 - c)^2$ is least at 3.75; tried are multiples of 0.12.

        >>> mse_range(torch.tensor([1.0] * 99 + [12.0]), 2)[1]
        tensor(3.7200)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} must be 1 to 8")
    _check(values)
    rows = values.reshape(-1, values.shape[-1]).float()

    def rounded(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = affine_grid(low, high, bits, symmetric=symmetric, scale_dtype=scale_dtype)
        return nearest(rows, scale, zero, bits)

    low, high = best_range(rows, rounded, norm=norm, steps=steps, least=least)
    return low.view(values.shape[:-1]), high.view(values.shape[:-1])


def zero_filled(weight: Tensor, granularity: Granularity, group_size: int) -> Tensor:
    """`to_groups`, but a shorter last group is filled up with zeros: they change neither an error nor a divergence.

    Examples:
        >>> zero_filled(torch.tensor([[1.0, 2.0, 3.0]]), "group", 2).tolist()
        [[1.0, 2.0], [3.0, 0.0]]
    """
    missing = -weight.shape[1] % group_size if granularity == "group" else 0
    return to_groups(F.pad(weight, (0, missing)), granularity, group_size)


def kl_range(values: Tensor, bits: int = 8, *, bins: int = BINS) -> Range:
    r"""The values' range, clipped at the threshold $\pm T$ of least divergence.

    Args:
        values: `[..., n]`, each row for itself.
        bits: 2 to 8; the positive half of a grid has $2^{bits-1}$ levels.
        bins: of the histogram; the slides have 2048.

    Returns:
        Least and greatest value of the range, `[...]`, float32; 0 lies between them.

    Raises:
        ValueError: bits outside 2 to 8, or fewer bins than levels; there are no values, or they hold NaN or infinity.

    Examples:
        >>> low, high = kl_range(torch.cat([torch.linspace(-1, 3, 4001), torch.tensor([40.0])]))
        >>> float(low), float(high)
        (-1.0, 3.017578125)
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be 2 to 8; with one bit, the positive half has a single level")
    _check(values)
    rows = values.reshape(-1, values.shape[-1]).float()
    thresholds = []
    for part in torch.split(rows, max(1, AT_ONCE // bins)):
        counts, width = magnitudes(part, bins)
        counts[:, 0] = counts[:, 1]
        thresholds.append((kl_bins(counts, 2 ** (bits - 1)) + 0.5) * width)
    threshold = torch.cat(thresholds).float().view(values.shape[:-1])
    low, high = _range(values.float())
    return torch.maximum(low, -threshold), torch.minimum(high, threshold)


def _check(values: Tensor) -> None:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values of shape {tuple(values.shape)} must be [..., n] with n >= 1")
    if values.numel() and not all(torch.isfinite(extreme) for extreme in values.aminmax()):  # they carry every NaN
        raise ValueError("values hold NaN or infinity: look for the weight or the calibration text that causes it")


def _range(values: Tensor) -> Range:
    """Least and greatest value along the last dimension, with 0 between them."""
    low, high = values.aminmax(dim=-1)
    return low.clamp(max=0), high.clamp(min=0)
