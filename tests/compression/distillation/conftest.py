"""Models small enough to know everything about: a table of bigrams, and a bell that is fitted to two."""

import pytest
import torch
from torch import nn

DOUBLE = torch.float64


class Table(nn.Module):
    """`[batch, time]` tokens to the row of logits of each, in float64."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.to(DOUBLE))

    def forward(self, tokens):
        return self.logits[tokens]


@pytest.fixture
def table(generator):
    """`table(n)`: a table over n tokens, new with each call."""
    return lambda n, scale=1.0: Table(scale * torch.randn(n, n, generator=generator))


GRID = torch.linspace(-8, 8, 161, dtype=DOUBLE)
BETWEEN = GRID.abs() < 1


def bell(mean, deviation):
    """Logits over the grid of a bell."""
    return -((GRID - mean) ** 2) / (2 * deviation**2)


@pytest.fixture
def two_bells():
    """Log-probabilities over the grid: 0.6 of a bell at -3, 0.4 of one at 3, both of deviation 0.7."""
    parts = [
        share * bell(torch.tensor(mean), torch.tensor(0.7)).softmax(0) for share, mean in ((0.6, -3.0), (0.4, 3.0))
    ]
    return sum(parts).log()


@pytest.fixture
def fit(two_bells):
    """`fit(loss)`: mean and deviation of the bell that is nearest the two by a loss, and its mass between them.

    The best of three starts, a wide one and one at each of the two, for some losses have a nearest bell at each.
    """

    def from_start(loss, mean, log_deviation):
        mean, log_deviation = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (mean, log_deviation))
        optimizer = torch.optim.LBFGS((mean, log_deviation), max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(bell(mean, log_deviation.exp())[None], two_bells[None], torch.zeros(1, dtype=torch.int64))
            value.backward()
            return value

        optimizer.step(closure)
        return closure().detach(), bell(mean, log_deviation.exp()).softmax(0).detach()

    def fitted(loss):
        _, q = min((from_start(loss, *start) for start in ((-1.0, 0.5), (-3.0, -0.3), (3.0, -0.3))), key=lambda x: x[0])
        mean = (q * GRID).sum()
        return float(mean), float((q * (GRID - mean) ** 2).sum().sqrt()), float(q[BETWEEN].sum())

    return fitted
