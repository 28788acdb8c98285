"""Hard concrete gates: the distribution in closed form, by quadrature and by counting; gradients; settled gates by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.pruning.hard_concrete import probability_of_zero, sample, settled

NOISE = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # u, evenly spaced


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 0.7, 4.6])
def test_distribution_in_closed_form(log_alpha):
    """Oracle: $P(z \\le x) = \\sigma(\\beta \\operatorname{logit}((x - \\gamma) / (\\zeta - \\gamma)) - \\log\\alpha)$, Louizos et al.,
    Eq. (11), counted over evenly spaced noise; its ends are the masses at 0 and at 1."""
    z = sample(torch.tensor(log_alpha, dtype=torch.float64), NOISE)

    def below(x):
        y = (x + 0.1) / 1.2
        return 1 / (1 + math.exp(-(2 / 3 * math.log(y / (1 - y)) - log_alpha)))

    for x in (0.0, 0.1, 0.5, 0.9):
        assert abs(float((z <= x).double().mean()) - below(x)) < 2e-5
    assert abs(float((z == 1).double().mean()) - (1 - below(1.0))) < 2e-5
    assert_close(
        float(probability_of_zero(torch.tensor(log_alpha, dtype=torch.float64))), below(0.0), rtol=1e-9, atol=0
    )
    assert z.min() >= 0 and z.max() <= 1


def test_worked_by_hand():
    """Oracle: by hand. At u = 1/2 and log alpha = beta log 3, s is 3/4 and z is 3/4 * 1.2 - 0.1 = 0.8; far out it is 0 and 1."""
    log_alpha = torch.tensor([2 / 3 * math.log(3.0), -9.0, 9.0], dtype=torch.float64)
    assert_close(sample(log_alpha, torch.full((3,), 0.5)).tolist(), [0.8, 0.0, 1.0])


def test_gradients():
    """Oracle: finite differences, of gates between 0 and 1; the expected number of open gates grows by P (1 - P)."""
    log_alpha = torch.tensor([-0.5, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.6, 0.4, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sample(x, noise), log_alpha)
    p = probability_of_zero(log_alpha)
    (gradient,) = torch.autograd.grad((1 - p).sum(), log_alpha)
    assert_close(gradient, (p * (1 - p)).detach())
    extremes = torch.tensor([0.0, 1.0])
    assert torch.isfinite(sample(torch.zeros(2), extremes)).all()


def test_settled_gates():
    """Oracle: by hand. sigma(0.8 * 1.5 x); the smallest close, each row for itself; so many as are expected, or as are asked for."""
    log_alpha = torch.tensor([[1.0, -3.0, 2.0, 1.0], [0.0, -1.0, -2.0, -3.0]])
    gates = settled(log_alpha, 2)
    sigma = lambda x: 1 / (1 + math.exp(-1.2 * x))  # noqa: E731
    assert_close(gates, torch.tensor([[0, 0, sigma(2.0), sigma(1.0)], [sigma(0.0), sigma(-1.0), 0, 0]]))
    expected = (
        log_alpha.numel() - settled(log_alpha).count_nonzero(),
        probability_of_zero(log_alpha).sum(-1).round().sum(),
    )
    assert expected[0] == expected[1] > 0
