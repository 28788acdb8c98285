"""Levels: the official signposts from another library's normal distribution, the best clusters by dynamic programming, moments."""

import itertools
import statistics

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.quantized.levels import fitted_levels, nearest, normal_levels, normalized_levels


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_levels_by_the_official_steps(bits):
    """Oracle: the official code's loop of percentiles, with the standard library's normal distribution."""
    inverse, tail, half = statistics.NormalDist().inv_cdf, (1 / 32 + 1 / 30) / 2, 2 ** (bits - 1)
    below = [inverse(min(0.5, tail + i * (0.5 - tail) / (half - 1))) for i in range(half)]
    above = [inverse(0.5 + i * (0.5 - tail) / half) for i in range(1, half + 1)]
    expected = [x / -below[0] for x in below] + [x / above[-1] for x in above]
    assert_close(normal_levels(bits), torch.tensor(expected))


def test_nearest_by_brute_force(generator):
    """Oracle: the least of all distances."""
    levels, x = torch.randn(8, generator=generator).sort().values, torch.randn(500, generator=generator)
    assert torch.equal(nearest(x, levels).long(), (x[:, None] - levels).abs().argmin(dim=1))


def best(values, weights, count):
    """The least weighted error of all ways to cut the sorted values into so many pieces."""
    order = values.argsort()
    x, w = values[order].double(), weights[order].double()
    cost = {}
    for a, b in itertools.combinations(range(len(x) + 1), 2):
        mean = (w[a:b] * x[a:b]).sum() / w[a:b].sum()
        cost[a, b] = float((w[a:b] * (x[a:b] - mean) ** 2).sum())
    least = [cost[0, b] if b else 0.0 for b in range(len(x) + 1)]
    for _ in range(count - 1):
        least = [min([least[b], *(least[a] + cost[a, b] for a in range(1, b))]) for b in range(len(x) + 1)]
    return least[-1]


@pytest.mark.parametrize("kind", ["one far away", "one of great weight"])
def test_both_starts_are_needed(kind, generator):
    """Oracle: dynamic programming; from equal distances the first is missed by far, from quantiles of the weight the second."""
    values, weights = torch.randn(30, generator=generator), torch.ones(30)
    (values if kind == "one far away" else weights)[0] = 1000.0
    levels = fitted_levels(values, weights, 2)
    error = float((weights * (values - levels[nearest(values, levels).long()]) ** 2).sum())
    assert error <= 1.3 * best(values, weights, 4) + 1e-3


def test_fitted_levels_are_near_the_best(generator):
    """Oracle: dynamic programming over all cuts; below it nothing comes, and unweighted levels miss it by much."""
    values, weights = torch.randn(40, generator=generator), torch.rand(40, generator=generator) ** 6
    error = {}
    for name, used in (("weighted", weights), ("alike", torch.ones(40))):
        levels = fitted_levels(values, used, 2)
        error[name] = float((weights * (values - levels[nearest(values, levels).long()]) ** 2).sum())
    least = best(values, weights, 4)
    assert least - 1e-6 <= error["weighted"] <= 1.1 * least
    assert error["alike"] > 1.2 * error["weighted"]


def test_fitted_levels_by_hand():
    """Oracle: by hand: weighted means of two clumps; weights of 0 all count alike; fewer numbers than levels."""
    x = torch.tensor([10.0, 0.0, 2.0, 12.0])
    assert fitted_levels(x, torch.tensor([3.0, 1, 3, 1]), 1).tolist() == [1.5, 10.5]
    assert fitted_levels(x, torch.zeros(4), 1).tolist() == [1, 11]
    assert set(fitted_levels(x[:1], torch.ones(1), 2).tolist()) == {10}
    assert fitted_levels(torch.arange(3.0), torch.ones(3), 1).tolist() == [0.5, 2]  # halfway goes to the lower


def test_normalized_levels_keep_the_moments(generator):
    """Oracle: mean and deviation of the numbers themselves; without them they differ. Numbers of one code change nothing."""
    x, levels = torch.randn(1000, generator=generator) * 0.3 + 0.1, torch.tensor([-1.0, -0.3, 0.3, 1.0])
    found = normalized_levels(levels, x)[nearest(x, levels).long()]
    assert_close(found.mean(), x.mean(), rtol=0, atol=1e-5)
    assert_close(found.std(), x.std())
    assert (levels[nearest(x, levels).long()].std() - x.std()).abs() > 0.01
    assert normalized_levels(levels, torch.full((5,), 0.9)).tolist() == levels.tolist()
