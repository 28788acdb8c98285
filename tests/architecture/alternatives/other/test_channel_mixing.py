"""The branch over channels: its equations with loops, steps and chunks, and the values it starts with."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.channel_mixing import ChannelMixing
from refimpl.architecture.alternatives.protocol import state_bytes


def test_equals_the_equations(generator):
    """Oracle: Eqs. (14), (15) and (18), position by position, in float64; the state is the input before."""
    mixer = ChannelMixing(4, 10, generator, layer=1, n_layers=3).double()
    x = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    p = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    whole, state, halves = mixer(x), mixer.initial_state(2), []
    for row in range(2):
        before = torch.zeros(4, dtype=torch.float64)
        for t, now in enumerate(x[row]):
            r, k = (
                p[f"{name}.weight"] @ (p[f"time_mix_{name}"] * now + (1 - p[f"time_mix_{name}"]) * before)
                for name in ("receptance", "key")
            )
            squared = torch.where(k > 0, k * k, 0.0)
            assert_close(whole[row, t], (p["value.weight"] @ squared) / (1 + (-r).exp()))
            before = now
    for part in (x[:, :3], x[:, 3:6]):
        y, state = mixer.extend(part, state)
        halves.append(y)
    last, state = mixer.step(x[:, 6], state)
    assert_close(torch.cat((*halves, last[:, None]), dim=1), whole)
    assert torch.equal(state, x[:, 6]) and state_bytes(state) == 2 * 4 * 8


def test_initial_values_and_shapes(generator):
    """Oracle: by hand, (i / width) ** (1 - layer / layers) for both mixtures."""
    mixer = ChannelMixing(8, 20, generator, layer=1, n_layers=2)
    for mix in (mixer.time_mix_key, mixer.time_mix_receptance):
        assert_close(mix, (torch.arange(8) / 8).sqrt())
    with pytest.raises(ValueError, match="must be"):
        mixer(torch.ones(2, 8))
