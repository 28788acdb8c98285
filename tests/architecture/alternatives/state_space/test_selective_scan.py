"""The selective scan: the recurrence by definition, a time-invariant system's closed form, long inputs, chunks, memory."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.state_space.selective_scan import selective_scan


def draw(generator, batch=2, time=13, channels=3, n=5, dtype=torch.float64):
    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, delta, A = randn(batch, time, channels), randn(batch, time, channels).exp(), -randn(channels, n).exp()
    given = u, delta, A, randn(batch, time, n), randn(batch, time, n), randn(batch, channels, n)
    return [x.to(dtype) for x in given]


def by_definition(u, delta, A, B, C, initial):
    """Eq. (2a) and (2b) with the decay of Eq. (4), one number after the other."""
    batch, time, channels = u.shape
    state, y = initial.clone(), torch.zeros_like(delta)
    for b in range(batch):
        for t in range(time):
            for d in range(channels):
                h = torch.exp(delta[b, t, d] * A[d]) * state[b, d] + delta[b, t, d] * B[b, t] * u[b, t, d]
                y[b, t, d] = C[b, t] @ h
                state[b, d] = h
    return y, state


@pytest.mark.parametrize(("time", "chunk"), [(1, 4), (4, 4), (13, 4), (13, 64), (9, 1)])
def test_equals_the_recurrence_by_definition(time, chunk, generator):
    """Oracle: brute force in float64."""
    given = draw(generator, time=time)
    y, state = selective_scan(*given, chunk=chunk)
    expected = by_definition(*given)
    assert_close((y, state), expected)
    without = by_definition(*given[:5], torch.zeros_like(given[5]))
    assert (y - without[0]).abs().max() > 0.01  # negative control: the initial state counts


def test_a_time_invariant_system_in_closed_form():
    """Oracle: closed form. With Δ, B, C and u constant, y_t = C Δ B u (1 - a^t) / (1 - a), a = exp(Δ A)."""
    delta, A, B, C, u, t = 0.3, -0.7, 2.0, -1.5, 0.25, torch.arange(1, 301, dtype=torch.float64)
    a = torch.tensor(delta * A, dtype=torch.float64).exp()

    def constant(value):
        return torch.full((1, 300, 1), value, dtype=torch.float64)

    start = torch.zeros(1, 1, 1, dtype=torch.float64)
    y, state = selective_scan(
        constant(u), constant(delta), torch.tensor([[A]], dtype=torch.float64), constant(B), constant(C), start
    )
    assert_close(y.flatten(), C * delta * B * u * (1 - a**t) / (1 - a))
    assert_close(state.item(), delta * B * u * ((1 - a**300) / (1 - a)).item())


def test_ten_thousand_steps_of_any_size(generator):
    """Oracle: float64 by the plain recurrence. ΔA from -1e-6 to -1e4: exp(-sum ΔA) would overflow after one step."""
    u, _, _, B, C, initial = draw(generator, 1, 10_000, 2, 3)
    delta = 10 ** (10 * torch.rand(1, 10_000, 2, generator=generator, dtype=torch.float64) - 6)
    A = -torch.tensor([[1.0, 0.5, 1e-3], [2.0, 1.0, 1e-6]], dtype=torch.float64)
    state, expected = initial, []
    for t in range(10_000):
        state = (delta[:, t, :, None] * A).exp() * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        expected.append((state @ C[:, t, :, None])[..., 0])
    given = [x.float() for x in (u, delta, A, B, C, initial)]
    y, last = selective_scan(*given)
    scale = delta.max().item()
    assert_close(
        (y / scale).double(), torch.stack(expected, dim=1) / scale, rtol=1e-4, atol=1e-5
    )  # 10,000 rounded decays
    assert torch.isfinite(last).all()


def test_gradients(generator):
    """Oracle: finite differences, over chunk borders; and autograd through the definition."""
    given = [x.requires_grad_() for x in draw(generator, batch=1, time=5, channels=2, n=2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, chunk=2), given)
    ours, theirs = (
        torch.autograd.grad(sum(part.square().sum() for part in f(*given)), given)
        for f in (lambda *x: selective_scan(*x, chunk=3), _vectorised)
    )
    assert_close(ours, theirs)


def _vectorised(u, delta, A, B, C, initial):
    state, outs = initial, []
    for t in range(u.shape[1]):
        state = (delta[:, t, :, None] * A).exp() * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outs.append((state @ C[:, t, :, None])[..., 0])
    return torch.stack(outs, dim=1), state


def test_states_do_not_stay_for_the_gradient(generator):
    """Oracle: a count of what autograd keeps; 1,024 states of 16 numbers a channel would be 16 times the inputs."""
    given = [x.requires_grad_() for x in draw(generator, 1, 1024, 32, 16, torch.float32)]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    states, counted = 1024 * 32 * 16 * 4, []
    for scan in (selective_scan, _vectorised):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _ = scan(*given)
        assert y.requires_grad
        counted.append(sum(kept.values()) / states)
    inputs = (2 * 32 + 2 * 16) / (32 * 16)  # u, delta, B and C
    assert inputs < counted[0] < inputs + 2 / 64  # and a state a chunk
    assert counted[1] > 2  # negative control: decays and states of all positions


def test_chunk_is_checked(generator):
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        selective_scan(*draw(generator), chunk=0)
