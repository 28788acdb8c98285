"""The search over switches: its Gaussian process against PyTorch's own normal distributions, and sets that are known."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from refimpl.inference.decoding.bayesian_search import (
    LENGTH_SCALES,
    NOISE,
    _corners,
    log_likelihood,
    matern,
    maximize,
    posterior,
)


def cube(size):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)


def test_the_kernel_is_the_transform_of_its_spectrum():
    """Oracle: Bochner's theorem: the Matern kernel of order 5/2 has, on a line, the spectral density of a Student t with 5 degrees
    of freedom, frequencies divided by the length scale; the cosine's mean over it, by quadrature."""
    t = torch.linspace(-60, 60, 60_001, dtype=torch.float64)
    density = math.gamma(3) / (math.sqrt(5 * math.pi) * math.gamma(2.5)) * (1 + t.square() / 5) ** -3
    for distance, length in ((0.3, 1.0), (1.0, 0.5), (2.0, 3.0)):
        expected = torch.trapezoid(density * (t * distance / length).cos(), t)
        x = torch.tensor([[0.0], [distance]], dtype=torch.float64)
        assert_close(matern(x, x, length)[0, 1], expected, rtol=0, atol=1e-6)


def test_what_is_expected_elsewhere_is_the_conditional_distribution(generator):
    """Oracle: the joint normal's conditional mean and variance, with a matrix that is inverted outright, at the likeliest length."""
    corners = cube(4)
    points, others = corners[[0, 3, 5, 10, 15]], corners[[1, 2, 3, 12]]
    values = 3 + 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    scale = values.std(correction=0)
    y = (values - values.mean()) / scale
    length = max(LENGTH_SCALES, key=lambda given: log_likelihood(points, y, given))
    joint = matern(torch.cat((points, others)), torch.cat((points, others)), length)
    inverse = (joint[:5, :5] + NOISE * torch.eye(5, dtype=torch.float64)).inverse()
    mean, deviation = posterior(points, values, others)
    assert_close(mean, values.mean() + scale * joint[5:, :5] @ inverse @ y)
    assert_close(deviation, scale * (joint[5:, 5:] - joint[5:, :5] @ inverse @ joint[:5, 5:]).diagonal().sqrt())
    assert deviation[2] < deviation[[0, 1, 3]].min()  # control: what was measured is known best


@pytest.mark.parametrize("length", [0.5, 4.0])
def test_likelihood_is_the_normal_distributions(generator, length):
    """Oracle: torch.distributions."""
    points, y = cube(3), torch.randn(8, generator=generator, dtype=torch.float64)
    covariance = matern(points, points, length) + NOISE * torch.eye(8, dtype=torch.float64)
    expected = MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance).log_prob(y)
    assert_close(log_likelihood(points, y, length), expected)


def test_it_finds_what_drawing_at_random_does_not(generator):
    """Oracle: by construction: 12 switches, each worth something or costing something, one pair that matters together.

    40 trials of 4,096 sets; as many drawn at random, ten times over, stay behind each time.
    """
    worth = torch.randn(12, generator=generator)
    calls = []

    def value(x):
        calls.append(x.tolist())
        return float(worth[x].sum() + 2 * (x[3] & x[7]))

    best, tried = maximize(value, 12, 40, generator)
    most = max(value(x > 0) for x in cube(12))
    assert len(tried) == 40 == len({tuple(x) for x in calls[:40]})  # no set twice
    assert value(best) == max(found for _, found in tried) > 0.95 * most
    for _ in range(10):
        drawn = torch.rand(40, 12, generator=generator) > 0.5
        assert max(value(x) for x in drawn) < value(best)


def test_many_switches_are_not_listed(generator):
    """Oracle: by construction: the more of 60 switches are on, the better; the search goes on where one switch helps."""
    best, tried = maximize(lambda x: float(x.sum()), 60, 12, generator)
    assert best.sum() > tried[0][1] + 5
    assert ((_corners(best, generator) ^ best).sum(dim=1) == 1).sum() == 60  # no drawn one is so near


def test_few_sets_are_tried_once_each(generator):
    """Oracle: by hand: two switches have four sets, also where all are worth the same."""
    best, tried = maximize(lambda x: float(x[0] & ~x[1]), 2, 100, generator)
    assert best.tolist() == [True, False] and len(tried) == 4
    assert len(maximize(lambda x: 1.0, 3, 100, generator)[1]) == 8


def test_arguments_are_checked(generator):
    for size, trials in ((0, 5), (3, 0)):
        with pytest.raises(ValueError, match=f"size={size} and trials={trials}"):
            maximize(lambda x: 0.0, size, trials, generator)
    with pytest.raises(ValueError, match="must be finite"):
        maximize(lambda x: float("nan"), 3, 5, generator)


def test_what_is_least_known_is_tried_next(generator):
    """Oracle: after one trial all means are equal, and the set that is farthest from it has the largest deviation; drawn, or given."""
    for first in (None, torch.tensor([True, False, False, True, False])):
        _, tried = maximize(lambda _: 1.0, 5, 2, generator, first)
        assert torch.equal(tried[1][0], ~tried[0][0])
        assert first is None or torch.equal(tried[0][0], first)
