"""The parallel scan: one position after the other, closed forms, gradients, and extreme decays."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.scan import linear_scan


def draw(generator, *shape, dtype=torch.float64):
    decay = torch.rand(shape, generator=generator, dtype=torch.float64)
    inputs, initial = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (shape[0], *shape[2:]))
    )
    if dtype.is_complex:
        turn = torch.randn(shape, generator=generator, dtype=torch.float64)
        decay, inputs, initial = torch.polar(decay, turn), inputs * (1 + 2j), initial * (3 - 1j)
    return decay.to(dtype), inputs.to(dtype), initial.to(dtype)


def one_by_one(decay, inputs, initial):
    states, state = [], initial
    for a, b in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("time", [*range(1, 10), 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_one_position_after_the_other(time, dtype, generator):
    """Oracle: the recurrence by definition."""
    given = draw(generator, 3, time, 2, 5, dtype=dtype)
    before = [x.clone() for x in given]
    assert_close(linear_scan(*given), one_by_one(*given))
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_closed_form_of_a_geometric_series():
    """Oracle: closed form. With a and b constant, h_t = a^t h_0 + b (1 - a^t) / (1 - a)."""
    a, b, start, t = 0.9, 2.0, 5.0, torch.arange(1, 201, dtype=torch.float64)
    ones = torch.ones(1, 200, dtype=torch.float64)
    states = linear_scan(a * ones, b * ones, torch.tensor([start], dtype=torch.float64))
    assert_close(states[0], a**t * start + b * (1 - a**t) / (1 - a))


@pytest.mark.parametrize("time", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients(time, dtype, generator):
    """Oracle: finite differences, and autograd through the recurrence by definition."""
    given = [x.requires_grad_() for x in draw(generator, 2, time, 3, dtype=dtype)]
    assert torch.autograd.gradcheck(linear_scan, given)
    weight = draw(generator, 2, time, 3, dtype=dtype)[1]
    ours, theirs = (
        torch.autograd.grad((f(*given) * weight).abs().square().sum(), given) for f in (linear_scan, one_by_one)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_positions_of_any_decay(dtype, generator):
    """Oracle: the recurrence in float64. Decays of 0, 1e-30 and 1 mixed: a quotient of products would be 0 / 0."""
    decay = torch.tensor([0.0, 1e-30, 0.5, 1.0], dtype=torch.float64)[
        torch.randint(0, 4, (1, 10_000, 3), generator=generator)
    ]
    inputs = torch.randn(1, 10_000, 3, generator=generator, dtype=torch.float64)
    given = [x.to(dtype).requires_grad_() for x in (decay, inputs, inputs[:, 0])]
    states = linear_scan(*given)
    assert_close(states, one_by_one(*(x.detach().double() for x in given)).to(dtype))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(states.sum(), given))


def test_what_does_not_fit_is_refused():
    ones = torch.ones(2, 3, 4)
    for bad, message in [
        ((ones, ones[:, :2], ones[:, 0]), "must be"),
        ((ones, ones, ones[:1, 0]), r"initial \(1, 4\)"),
        ((ones[:, :0], ones[:, :0], ones[:, 0]), "at least one position"),
        ((ones, ones.double(), ones[:, 0]), "must be one"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_scan(*bad)
