"""The weighted average: its sums by definition, huge keys, long inputs, chunks, gradients, transformers' loop."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.wkv import NOTHING, no_past, wkv, wkv_step


def draw(generator, batch=2, time=13, channels=3, size=1.0):
    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    key, value = size * randn(batch, time, channels), randn(batch, time, channels)
    return key, value, randn(channels).exp(), randn(channels)


def by_definition(key, value, decay, bonus):
    """The sums of the paper's definition, for each position anew, each divided by its largest term."""
    outs = []
    for t in range(key.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=key.dtype)[:, None]
        exponent = torch.cat((key[:, :t] - age * decay, key[:, t : t + 1] + bonus), dim=1)
        outs.append((exponent.softmax(dim=1) * value[:, : t + 1]).sum(dim=1))
    return torch.stack(outs, dim=1)


def stepped(key, value, decay, bonus):
    state, outs = no_past(key[:, 0]), []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        y, state = wkv_step(k, v, decay, bonus, state)
        outs.append(y)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize(("time", "chunk"), [(1, 4), (4, 4), (13, 4), (13, 64), (9, 1)])
def test_equals_the_definition(time, chunk, generator):
    """Oracle: brute force in float64, every position's sums anew; steps and their state."""
    given = draw(generator, time=time, size=3.0)
    y, state = wkv(*given, no_past(given[0][:, 0]), chunk=chunk)
    assert_close(y, by_definition(*given))
    assert_close((y, state), stepped(*given))
    if time > 1:  # negative control: bonus and decay count
        assert (by_definition(*given[:3], given[3] + 1) - y).abs().max() > 0.01
        assert time == 2 or (by_definition(*given[:2], 2 * given[2], given[3]) - y).abs().max() > 0.01


def test_worked_by_hand():
    """Oracle: by hand. Keys ln 2 and 0, decay ln 2: the past weighs 2 at the second position, and 2/2 + 1 at the third."""
    key = torch.tensor([[[2.0], [1.0], [1.0]]]).log()
    value, half, none = torch.tensor([[[6.0], [3.0], [0.0]]]), torch.tensor([2.0]).log(), torch.zeros(1)
    y, state = wkv(key, value, half, none, no_past(key[:, 0]))
    assert_close(y.flatten(), torch.tensor([6.0, (2 * 6 + 3) / 3, (1 * 6 + 1 * 3 + 0) / 3]))
    assert_close(state.denominator * state.exponent.exp(), torch.tensor([[0.5 + 0.5 + 1]]))


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_huge_keys_do_not_overflow(size, generator):
    """Oracle: float64 by a softmax over all positions. Keys of both signs, and e^100 is beyond float32."""
    key, value, decay, bonus = draw(generator, time=200)
    key = size * key.sign()
    given = [x.float().requires_grad_() for x in (key, value, decay, bonus)]
    y, state = wkv(*given, no_past(given[0][:, 0]))
    expected = by_definition(*(x.detach().double() for x in given))
    assert_close(y.detach().double(), expected, rtol=1e-4, atol=1e-4)  # exponents of 1,000 are rounded to 6e-5
    assert all(torch.isfinite(x).all() for x in (*state, *torch.autograd.grad(y.square().sum(), given)))
    assert not torch.isfinite(given[0].exp()).all()  # negative control: the plain sums do overflow


def test_ten_thousand_positions(generator):
    """Oracle: position by position in float64; decays from 0.0067 a position to e^20."""
    key, value, _, bonus = draw(generator, 1, 10_000, 3)
    decay = torch.tensor([-5.0, 0.0, 3.0], dtype=torch.float64).exp()
    with torch.no_grad():
        expected, _ = stepped(key, value, decay, bonus)
    y, _ = wkv(*(x.float() for x in (key, value, decay, bonus)), no_past(key[:, 0].float()))
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums of some hundred terms
    assert y[..., 0].abs().mean() < 0.5 * y[..., 2].abs().mean()  # negative control: a slow decay averages much more


def test_gradients(generator):
    """Oracle: finite differences over a chunk border; autograd through the definition, at keys of any size."""
    given = [x.requires_grad_() for x in draw(generator, batch=1, time=5, channels=2)]
    assert torch.autograd.gradcheck(lambda *x: wkv(*x, no_past(x[0][:, 0]), chunk=2)[0], given)
    given = [x.requires_grad_() for x in draw(generator, time=40, size=8.0)]
    weight = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    ours, theirs, steps = (
        torch.autograd.grad((f(*given) * weight).sum(), given)
        for f in (lambda *x: wkv(*x, no_past(x[0][:, 0]), chunk=16)[0], by_definition, lambda *x: stepped(*x)[0])
    )
    assert_close(ours, theirs)
    assert_close(ours, steps)


def test_outputs_are_averages(generator):
    """Oracle: an average lies between the least and the largest value; with one value it is that value."""
    key, value, decay, bonus = draw(generator, time=50, size=20.0)
    y, _ = wkv(key, value, decay, bonus, no_past(key[:, 0]))
    assert (y <= value.cummax(dim=1).values + 1e-9).all() and (y >= value.cummin(dim=1).values - 1e-9).all()
    assert_close(wkv(key, torch.full_like(value, 7.0), decay, bonus, no_past(key[:, 0]))[0], torch.full_like(y, 7.0))


def test_equals_transformers(generator):
    """Oracle: transformers' loop for a processor (5.23), which takes the logarithm of the decay; output and state."""
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    key, value, decay, bonus = (x.float() for x in draw(generator, time=60, size=5.0))
    theirs, state = rwkv_linear_attention_cpu(decay.log(), bonus, key, value, return_state=True)
    assert_close(wkv(key, value, decay, bonus, no_past(key[:, 0])), (theirs, tuple(state)), rtol=1e-4, atol=1e-5)


def test_arguments(generator):
    given = draw(generator)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        wkv(*given, no_past(given[0][:, 0]), chunk=0)
    state = no_past(torch.ones(2, 3))
    assert state.exponent.eq(NOTHING).all() and not state.numerator.any() and not state.denominator.any()
