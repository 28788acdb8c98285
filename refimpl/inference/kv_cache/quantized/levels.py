r"""Levels that a number in [-1, 1] is rounded to, where they are not equally far apart.

Of b bits there are $2^b$ levels, in ascending order; a code is the index of the nearest.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """`[2^bits]` each: what codes are found with, and what they stand for."""

    encode: Tensor
    decode: Tensor


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Codes, uint8; a number halfway between two levels goes to the lower.

    Examples:
        >>> nearest(torch.tensor([-3.0, 0.4, 0.5, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 1, 1, 2]
    """
    return torch.bucketize(x, ((levels[1:] + levels[:-1]) / 2).to(x.dtype)).to(torch.uint8)


def normal_levels(bits: int) -> Tensor:
    r"""NormalFloat: quantiles of a normal distribution at equal distances, each half scaled to end at -1 and at 1; 0 is a level.

    Args:
        bits: 2 to 8.

    Returns:
        `[2^bits]`, float32: half of them from -1 to 0, the others above 0.

    Examples:
        >>> [round(x, 3) for x in normal_levels(2).tolist()]
        [-1.0, 0.0, 0.338, 1.0]
    """
    half, tail = 2 ** (bits - 1), (1 / 32 + 1 / 30) / 2
    below = torch.special.ndtri(torch.linspace(tail, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - tail, half + 1, dtype=torch.float64))[1:]
    return torch.cat((below / -below[0], above / above[-1])).float()


def fitted_levels(values: Tensor, weights: Tensor, bits: int, rounds: int = 50) -> Tensor:
    r"""Weighted k-means in one dimension: $\min \sum_i w_i (a_i - Q(a_i))^2$, by Lloyd's rounds.

    They start once from quantiles of the weight and once from equal distances, and the lower error wins.

    Args:
        values: `[n]`, n >= 1, finite.
        weights: `[n]`, not negative; if all are 0 they count alike.
        bits: 1 to 8.
        rounds: at most; the official code's 50.

    Returns:
        `[2^bits]`, ascending, float32; computed in float64.

    Examples:
        >>> fitted_levels(torch.tensor([0.0, 1.0, 4.0, 6.0]), torch.tensor([1.0, 3.0, 1.0, 1.0]), 1).tolist()
        [0.75, 5.0]
    """
    x, order = values.sort()
    x, w = x.double(), weights[order].double()
    if not bool(w.any()):
        w = torch.ones_like(w)
    sums = torch.cat((x.new_zeros(3, 1), torch.stack((w, w * x, w * x * x)).cumsum(dim=1)), dim=1)
    shares = (torch.arange(2**bits, dtype=x.dtype, device=x.device) + 0.5) / 2**bits
    quantiles = x[torch.searchsorted(sums[0, 1:], shares * sums[0, -1]).clamp(max=len(x) - 1)]
    found = [_moved(start, x, sums, rounds) for start in (quantiles, x[0].lerp(x[-1], shares))]
    return min(found, key=lambda pair: pair[1])[0].float()


def _moved(levels: Tensor, x: Tensor, sums: Tensor, rounds: int) -> tuple[Tensor, float]:
    """Levels after so many rounds, and their error; each goes to the mean of the numbers nearest to it.

    `sums` are those of w, wx and wx^2 up to each number `[3, n + 1]`.
    """
    for last in range(rounds, -1, -1):
        cuts = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2, right=True)
        mass, moment, square = sums[:, torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))))].diff()
        means = torch.where(mass > 0, moment / mass, levels)
        if not last or torch.equal(means, levels):
            break
        levels = means
    return levels, float((square - levels * (2 * moment - levels * mass)).sum())


def normalized_levels(levels: Tensor, values: Tensor) -> Tensor:
    r"""Q-Norm: levels to decode with, moved and stretched so that rounded numbers have the mean and the deviation of the numbers.

    Args:
        levels: `[2^bits]`, which codes are found with.
        values: `[n]`, what they stand for.

    Returns:
        `[2^bits]`; levels as they are if all values have one code.

    Examples:
        >>> found = normalized_levels(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0, 2.0, 3.0]))
        >>> [round(x, 3) for x in found.tolist()]
        [-0.581, 2.581]
    """
    rounded = levels[nearest(values, levels).long()]
    spread = rounded.std(correction=0)
    if not spread > 0:
        return levels
    stretch = values.std(correction=0) / spread
    return (levels - rounded.mean()) * stretch + values.mean()
