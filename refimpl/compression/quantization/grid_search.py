r"""Grids narrower than the range of the numbers: what lies beyond is clipped, and the rest gets a smaller step.

Both searches try a list of grids for each group and keep the one of least $\sum |x - \hat x|^{2.4}$, an exponent between the
squared error and the largest one. They differ in the list.

Source: `shrunk_grid` is the default of `obc`'s official code, IST-DASLab/OBC@9b7979bfc9ee20d87db553823a32ee9890beaa99, quant.py;
`moved_grid` that of `owq`, xvyaward/owq@03cfc9941cfbe951ca7dbc614c66bc625fbb9857, owq/quant.py.

Differs from the paper: each candidate's step is rounded to the type that it is stored in before it is judged; in the official
codes it is judged in float32.

Not here: searches that weigh numbers by their inputs.
"""

import torch
from torch import Tensor

from refimpl.compression.quantization.affine import affine_grid
from refimpl.compression.quantization.observers import mse_range

NORM = 2.4  # exponent of the error in both official codes
EXTREMES = 32  # one in so many numbers, at each end, serves to tell a grid that is too narrow without looking at all


def shrunk_grid(
    groups: Tensor, bits: int, *, symmetric: bool, scale_dtype: torch.dtype, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """The best of the grids that cover a group's range, 99 % of it, 98 %, down to 21 %.

    Args:
        groups: `[groups, size]`.
        bits: 1 to 8.
        symmetric: the range is [-m, m].
        scale_dtype: what scales are stored in.
        steps: parts that the range is cut into; a fifth of them is always kept.

    Returns:
        scale `[groups]`, in `scale_dtype`, and zero point `[groups]`, float32 holding integers.

    Raises:
        ValueError: a range is wider than `scale_dtype` can express.

    Examples:
        One bit, the levels 0 and s: a step of 1 keeps three numbers of four, where the whole range would keep one.

        >>> shrunk_grid(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), 1, symmetric=False, scale_dtype=torch.float32)[0] < 1.5
        tensor([True])
    """
    low, high = mse_range(
        groups,
        bits,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        norm=NORM,
        steps=steps,
        least=steps - steps * 4 // 5 + 1,
    )
    return affine_grid(low, high, bits, symmetric=symmetric, scale_dtype=scale_dtype)


def moved_grid(groups: Tensor, bits: int, *, scale_dtype: torch.dtype, steps: int = 100) -> tuple[Tensor, Tensor]:
    """The best of the grids whose width is a hundredth of a group's range, two hundredths, up to all of it, anywhere around 0.

    Args:
        groups: `[groups, size]`.
        bits: 1 to 8.
        scale_dtype: what scales are stored in.
        steps: widths that are tried, each with all `2^bits` zero points.

    Returns:
        As `shrunk_grid`.

    Raises:
        ValueError: a range is wider than `scale_dtype` can express.

    Examples:
        >>> scale, zero = moved_grid(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 2, scale_dtype=torch.float32)
        >>> scale.tolist(), zero.tolist()
        ([1.0], [1.0])
    """
    groups = groups.float()
    low, high = groups.aminmax(dim=1)
    scale, zero = affine_grid(low, high, bits, symmetric=False, scale_dtype=scale_dtype)
    least = torch.full_like(low, torch.inf)
    widest = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
    extremes = max(1, groups.shape[1] // EXTREMES)
    lowest, highest = (groups.topk(extremes, dim=1, largest=largest).values for largest in (False, True))
    # The widest first: one of them is rarely bad. A candidate that loses more by a few clipped numbers than the best in all is left out.
    for i in range(steps, 0, -1):
        tried = (widest * i / steps).to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
        for level in range(2**bits):
            first, last = -level * tried.float(), (2**bits - 1 - level) * tried.float()
            clipped = _beyond(first[:, None] - lowest) + _beyond(highest - last[:, None])
            rows = (clipped < least).nonzero()[:, 0]
            score = _score(groups[rows], tried[rows], level, bits)
            better = score < least[rows]
            rows = rows[better]
            scale[rows], zero[rows], least[rows] = tried[rows], float(level), score[better]
    return scale, zero


def _beyond(distance: Tensor) -> Tensor:
    """What numbers lose that stand this far beyond a grid's end, those of each group together, `[groups]`."""
    return distance.clamp_(min=0).pow_(NORM).sum(dim=1)


def _score(groups: Tensor, scale: Tensor, zero: int, bits: int) -> Tensor:
    """Sum of the errors' powers for each group, `[groups]`."""
    step = scale.float()[:, None]
    level = (groups / step).round_().clamp_(-zero, 2**bits - 1 - zero)
    return level.mul_(step).sub_(groups).abs_().pow_(NORM).sum(dim=1)
