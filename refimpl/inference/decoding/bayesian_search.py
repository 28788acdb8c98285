r"""Bayesian optimization over switches: which of many parts to leave out, where each trial is expensive and has no gradient.

What was measured so far is continued to all other sets by a Gaussian process, and the next trial is the set whose value could be
highest: mean plus some standard deviations.

Source: no paper of this survey; Rasmussen and Williams, Gaussian Processes for Machine Learning, Eq. (2.25), (2.26) and (2.30) and
the Matern class, Eq. (4.17); settings are those of dilab-zju/self-speculative-decoding@688db8b, searching.py, and of the
package that it calls, bayesian-optimization 1.4.3: Matern kernel of order 5/2, values normalized, noise 0.01, and an upper
confidence bound of 2.576 standard deviations.

Differs from the paper: the search is over the corners of the cube, each measured once; there it is over the whole cube, of which
a point stands for the corner nearest to it. The length scale is the likeliest of a grid, found there by ascent.

Not here: trials that are noisy, to be repeated; several at a time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

NOISE, DEVIATIONS = 1e-2, 2.576  # variance beside values of variance 1; of the bound
LENGTH_SCALES = tuple(0.25 * 2 ** (i / 2) for i in range(16))  # 0.25 to 45: sets of 1,000 parts are at most 32 apart
ALL_CORNERS, SOME_CORNERS = 4096, 2048  # looked through all if there are no more, else so many drawn ones


def maximize(
    value: Callable[[Tensor], float], size: int, trials: int, generator: torch.Generator, first: Tensor | None = None
) -> tuple[Tensor, list[tuple[Tensor, float]]]:
    """The best set of switches that was tried.

    Args:
        value: of `[size]` booleans; higher is better.
        size: switches, 1 or more.
        trials: calls of `value`; fewer if there are fewer sets.
        generator: source of the first set, and of those that are looked through where there are too many.
        first: `[size]` booleans to begin with, in the place of a drawn set.

    Returns:
        The best set `[size]`, and all that were tried with their values, in order.

    Raises:
        ValueError: no switch, no trial, or a value that is not finite.

    Examples:
        >>> wanted = torch.tensor([True, False, True, True, False])
        >>> best, tried = maximize(lambda x: -float((x ^ wanted).sum()), 5, 16, torch.Generator().manual_seed(0))
        >>> torch.equal(best, wanted), len(tried)
        (True, 16)
    """
    if size < 1 or trials < 1:
        raise ValueError(f"size={size} and trials={trials} must both be at least 1")
    tried: list[tuple[Tensor, float]] = []
    following = torch.rand(size, generator=generator) > 0.5 if first is None else first
    while True:
        found = float(value(following))
        if not math.isfinite(found):
            raise ValueError(f"value of {following.tolist()} is {found}: it must be finite")
        tried.append((following, found))
        best = max(tried, key=lambda pair: pair[1])[0]
        if len(tried) == trials or len(tried) == 2**size:
            return best, tried
        points = torch.stack([x for x, _ in tried]).double()
        values = torch.tensor([y for _, y in tried], dtype=torch.float64)
        corners = _corners(best, generator)
        corners = corners[torch.cdist(corners.double(), points, p=1).amin(dim=1) > 0]  # each is tried once
        mean, deviation = posterior(points, values, corners.double())
        following = corners[int((mean + DEVIATIONS * deviation).argmax())]


def posterior(points: Tensor, values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    r"""What measured values let expect elsewhere: $K_* (K + \sigma^2 I)^{-1} y$ and the root of its variance (Eq. 2.25, 2.26).

    Args:
        points: `[n, size]`, float64.
        values: `[n]`, taken as of mean 0 and variance 1.
        others: `[m, size]`.

    Returns:
        Mean and standard deviation, `[m]` each, in units of the values.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> mean, deviation = posterior(points, torch.tensor([1.0, 3.0], dtype=torch.float64), points)
        >>> mean.round(decimals=1).tolist(), bool((deviation < 0.2).all())  # 0.2 is twice the noise
        ([1.0, 3.0], True)
    """
    mean = values.mean()
    scale = values.std(correction=0) if len(values) > 1 else values.new_ones(())
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    y = (values - mean) / scale
    length = max(LENGTH_SCALES, key=lambda length: float(log_likelihood(points, y, length)))
    factor = torch.linalg.cholesky(_noisy(points, length))
    across = matern(points, others, length)
    solved = torch.linalg.solve_triangular(factor, across, upper=False)  # [n, m]
    weights = torch.cholesky_solve(y[:, None], factor)
    deviation = (1 - solved.square().sum(dim=0)).clamp(min=0).sqrt()
    return mean + scale * (across.T @ weights).squeeze(1), scale * deviation


def log_likelihood(points: Tensor, y: Tensor, length: float) -> Tensor:
    r"""Of normalized values: $-\frac12 y^T (K + \sigma^2 I)^{-1} y - \frac12 \log|K + \sigma^2 I| - \frac n2 \log 2\pi$ (Eq. 2.30)."""
    factor = torch.linalg.cholesky(_noisy(points, length))
    fit = y @ torch.cholesky_solve(y[:, None], factor).squeeze(1)
    return -fit / 2 - factor.diagonal().log().sum() - len(y) / 2 * math.log(2 * math.pi)  # type: ignore[no-any-return]


def matern(one: Tensor, other: Tensor, length: float) -> Tensor:
    r"""The kernel of order 5/2, $(1 + s + s^2/3) e^{-s}$ with $s = \sqrt5\,r/\ell$ (Eq. 4.17): `[n, size]`, `[m, size]` to `[n, m]`.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> round(matern(x, x, 5.0)[0, 1].item(), 3)  # sqrt(5) apart: (1 + 2.236 + 1.667) / 9.356
        0.524
    """
    s = math.sqrt(5) / length * torch.cdist(one, other)
    return (1 + s + s.square() / 3) * (-s).exp()


def _noisy(points: Tensor, length: float) -> Tensor:
    return matern(points, points, length) + NOISE * torch.eye(len(points), dtype=points.dtype)


def _corners(best: Tensor, generator: torch.Generator) -> Tensor:
    """Sets to choose the next from, `[m, size]`: all, or drawn ones and those that differ from the best in one switch."""
    size = len(best)
    if 2**size <= ALL_CORNERS:
        return torch.cartesian_prod(*[torch.tensor([False, True])] * size).view(-1, size)
    drawn = torch.rand(SOME_CORNERS, size, generator=generator) > 0.5
    return torch.cat((drawn, best ^ torch.eye(size, dtype=torch.bool)))
