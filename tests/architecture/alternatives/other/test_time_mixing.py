"""The branch over time: its equations with loops, and the values it starts with."""

import math

import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.time_mixing import TimeMixing, orthogonal, shifted


def test_equals_the_equations(generator):
    """Oracle: Eqs. (11) to (13), (16) and (17) for one channel and position after the other, in float64."""
    mixer = TimeMixing(4, 6, generator, layer=1, n_layers=3).double()
    x = torch.randn(1, 7, 4, generator=generator, dtype=torch.float64)
    p = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    out, before, past = [], torch.zeros(4, dtype=torch.float64), []
    for now in x[0]:
        r, k, v = (
            p[f"{name}.weight"] @ (p[f"time_mix_{name}"] * now + (1 - p[f"time_mix_{name}"]) * before)
            for name in ("receptance", "key", "value")
        )
        w, u = p["time_decay"].exp(), p["time_first"]
        numerator, denominator = (u + k).exp() * v, (u + k).exp()
        for age, (old_k, old_v) in enumerate(reversed(past)):
            numerator, denominator = (
                numerator + (old_k - age * w).exp() * old_v,
                denominator + (old_k - age * w).exp(),
            )
        out.append(p["output.weight"] @ (numerator / denominator / (1 + (-r).exp())))
        before, past = now, [*past, (k, v)]
    assert_close(mixer(x)[0], torch.stack(out))
    assert (mixer(x.flip(1)).flip(1) - mixer(x)).abs().max() > 0.01  # negative control: order counts


def test_initial_values():
    """Oracle: the official code's rules by hand, at the ends of layers and channels."""
    first, middle, last = (TimeMixing(8, 5, None, layer, 3) for layer in range(3))
    assert_close(first.time_decay, torch.tensor([-5 + 8 * (i / 4) ** 0.7 for i in range(5)]))
    assert_close(last.time_decay, torch.tensor([-5 + 8 * (i / 4) ** 2.0 for i in range(5)]))
    assert first.time_decay.exp().min() > 0.0067 and first.time_decay.exp().max() < 20.1  # e^-5 and e^3
    zigzag = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5])
    assert_close(middle.time_first, math.log(0.3) + zigzag)
    assert_close(first.time_mix_key, torch.arange(8) / 8)
    assert_close(middle.time_mix_value, (torch.arange(8) / 8) ** (2 / 3) + 0.15)
    assert_close(last.time_mix_receptance, (torch.arange(8) / 8) ** (1 / 6))


def test_initial_values_beside_transformers():
    """Oracle: transformers (5.23), but for the bonus, which is 1 everywhere there: a parenthesis stands at another place."""
    from transformers import RwkvConfig, RwkvModel

    theirs = RwkvModel(RwkvConfig(vocab_size=5, hidden_size=12, num_hidden_layers=3)).blocks[1].attention
    ours = TimeMixing(12, 12, None, 1, 3)
    for name in ("time_decay", "time_mix_key", "time_mix_value", "time_mix_receptance"):
        assert_close(ours.get_parameter(name), theirs.get_parameter(name).detach().flatten())
    assert (theirs.time_first == 1).all()


def test_shift_and_orthogonal_layers(generator):
    """Oracle: by hand; the columns of a widening matrix have the size sqrt(out/in), the rows of a narrowing one 1."""
    x, last = torch.arange(6.0).view(1, 3, 2), torch.tensor([[8.0, 9.0]])
    assert shifted(x, last).tolist() == [[[8, 9], [0, 1], [2, 3]]]
    wide, narrow = orthogonal(4, 16, generator).weight, orthogonal(16, 4, generator).weight
    assert_close(wide.T @ wide, 4 * torch.eye(4))
    assert_close(narrow @ narrow.T, torch.eye(4))
