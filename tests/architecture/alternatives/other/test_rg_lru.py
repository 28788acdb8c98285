"""The gated recurrence: its equations with loops, variance, closed gates, resets, gradients, transformers' layer."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.rg_lru import STEEPEST, decay_and_input, rg_lru


def draw(generator, batch=2, time=9, channels=3):
    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, r, i = randn(batch, time, channels), *randn(2, batch, time, channels).sigmoid()
    return x, r, i, randn(channels) - 3, randn(batch, channels)


def by_definition(x, r, i, decay, initial, reset=None):
    """Eqs. (3) and (4) as they stand, with a = sigmoid(-decay); 1 for the root and 0 for the decay at a reset."""
    h, outs = initial, []
    for t in range(x.shape[1]):
        a = torch.sigmoid(-decay) ** (8 * r[:, t])
        root = (1 - a**2).sqrt()
        if reset is not None:
            a, root = torch.where(reset[:, t, None], 0, a), torch.where(reset[:, t, None], 1, root)
        h = a * h + root * (i[:, t] * x[:, t])
        outs.append(h)
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize("resets", [False, True])
def test_equals_the_equations(resets, generator):
    """Oracle: Eqs. (3) and (4), a power of a sigmoid, position by position in float64."""
    given = draw(generator)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 0], reset[1, [0, 5]] = True, True
    states, last = rg_lru(*given, reset if resets else None)
    expected = by_definition(*given, reset if resets else None)
    assert_close((states, last), (expected, expected[:, -1]))
    assert (by_definition(*given, None if resets else reset) - states).abs().max() > 0.01  # negative control


def test_a_reset_forgets_and_does_not_scale(generator):
    """Oracle: the official code's rule at the first position of a text: h = i x, whatever was before."""
    x, r, i, decay, initial = draw(generator)
    reset = torch.arange(9)[None] == 4
    states, _ = rg_lru(x, r, i, decay, initial, reset)
    assert_close(states[:, 4], i[:, 4] * x[:, 4])
    other, _ = rg_lru(x + (torch.arange(9) < 4)[:, None], r, i, decay, initial + 1, reset)
    assert_close(other[:, 4:], states[:, 4:])
    assert (other - states)[:, :4].abs().max() > 0.1


def test_keeps_the_variance(generator):
    """Oracle: theorem, a^2 + (1 - a^2) = 1: inputs of unit variance give states of unit variance, at any decay."""
    x = torch.randn(400, 200, 3, generator=generator)
    r, one = torch.rand(400, 200, 3, generator=generator), torch.ones(400, 200, 3)
    decay, start = torch.tensor([-6.0, -3.0, 1.0]), torch.randn(400, 3, generator=generator)
    states, _ = rg_lru(x, r, one, decay, start, None)
    assert states[:, -50:].var(dim=(0, 1)).tolist() == pytest.approx([1, 1, 1], abs=0.08)  # 400 independent slow states
    a, b = decay_and_input(one, r, one, decay, None, torch.float32)
    assert_close(a**2 + b**2, one)


def test_a_closed_gate_keeps_the_state(generator):
    """Oracle: Section 2.4. At r = 0 the decay is 1 and nothing is added; the gradient is finite there, its slope cut."""
    x, _, i, decay, initial = draw(generator)
    r = torch.zeros_like(x, requires_grad=True)
    states, _ = rg_lru(x, r, i, decay, initial, None)
    assert_close(states, initial[:, None].expand_as(states))
    (gradient,) = torch.autograd.grad(states[:, 0].sum(), r)
    rate = 8 * torch.nn.functional.softplus(decay)  # the slope of -log a; d(1 - a^2)/dr = 2 rate
    expected = -rate * initial + STEEPEST * 2 * rate * i[:, 0] * x[:, 0]
    assert_close(gradient[:, 0], expected)


def test_gradients(generator):
    """Oracle: finite differences; autograd through the definition."""
    given = [x.requires_grad_() for x in draw(generator, batch=1, time=4, channels=2)]
    assert torch.autograd.gradcheck(lambda *x: rg_lru(*x, None), given)
    given = [x.requires_grad_() for x in draw(generator, time=50)]
    ours, theirs = (
        torch.autograd.grad(f(*given).square().sum(), given) for f in (lambda *x: rg_lru(*x, None)[0], by_definition)
    )
    assert_close(ours, theirs)


def test_ten_thousand_steps(generator):
    """Oracle: the definition in float64; sums of thousands of inputs in float32."""
    x, r, i, decay, initial = draw(generator, 1, 10_000, 3)
    decay = torch.tensor([-9.0, -4.0, 2.0], dtype=torch.float64)
    expected = by_definition(x, r, i, decay, initial)
    states, _ = rg_lru(*(part.float() for part in (x, r, i, decay, initial)), None)
    assert_close(states.double(), expected, rtol=1e-3, atol=1e-3)  # decays of 1 - 1e-7 r are rounded to 6e-8


def test_equals_transformers(generator):
    """Oracle: transformers' layer (5.23), gates included, from the first position on."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    theirs = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=12, num_attention_heads=3))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=generator)
        x = torch.randn(2, 30, 12, generator=generator)
        gates = (
            (torch.einsum("bthi,hij->bthj", x.unflatten(-1, (3, 4)), weight) + bias).flatten(-2).sigmoid()
            for weight, bias in (
                (theirs.recurrent_gate_weight, theirs.recurrent_gate_bias),
                (theirs.input_gate_weight, theirs.input_gate_bias),
            )
        )
        first = torch.arange(30)[None] == 0
        ours, last = rg_lru(x, *gates, theirs.recurrent_param, torch.zeros(2, 12), first)
        assert_close(ours, theirs(x, torch.arange(30)[None]), rtol=1e-4, atol=1e-5)
        assert_close(last, theirs.recurrent_states, rtol=1e-4, atol=1e-5)
