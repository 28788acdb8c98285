"""Attention over a window: all pairs with a mask, blocks and pasts of any size, rotary positions on half of a head."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.local_attention import BLOCK, local_attention, rotate_first_half


def all_pairs(q, k, v, window):
    """Scores of all pairs, those outside of the window set to minus infinity."""
    time, keys = q.shape[2], k.shape[1]
    distance = torch.arange(keys - time, keys)[:, None] - torch.arange(keys)
    scores = torch.einsum("bhtd,bsd->bhts", q, k) / q.shape[-1] ** 0.5
    hidden = (distance < 0) | (distance > window)
    return torch.einsum("bhts,bsd->bhtd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [1, 5, 40, BLOCK, 1000])
@pytest.mark.parametrize(("past", "time"), [(0, 1), (0, 33), (7, 1), (5, 40), (0, 2 * BLOCK + 9), (40, BLOCK + 1)])
def test_equals_all_pairs(window, past, time, generator):
    """Oracle: brute force, all pairs with a mask: the own key and `window` before it, as in the official code."""
    q = torch.randn(2, 3, time, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, past + time, 8, generator=generator, dtype=torch.float64)
    ours = local_attention(q, k, v, window)
    assert_close(ours, all_pairs(q, k, v, window))
    if past + time > window + 1:  # negative control: one key less or more is seen
        assert (all_pairs(q, k, v, window + 1) - ours).abs().max() > 1e-6


def test_rotation_of_the_first_half(generator):
    """Oracle: pairs (i, i + head_dim / 4) as complex numbers, turned by theta^(-4i / head_dim) a position."""
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    positions = torch.tensor([0, 3, 4, 100, 7])
    turned = rotate_first_half(x, positions)
    angles = positions[:, None] * 10_000.0 ** -(torch.arange(4) / 4)
    expected = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(
        torch.ones(5, 4, dtype=torch.float64), angles.double()
    )
    assert_close(
        turned[..., :8], torch.cat((expected.real, expected.imag), dim=-1), rtol=1e-5, atol=1e-5
    )  # float32 angles
    assert torch.equal(turned[..., 8:], x[..., 8:]) and torch.equal(turned[:, 0], x[:, 0])
    assert (turned - x)[:, 1:, :8].abs().max() > 0.1
