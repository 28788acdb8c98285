"""Rotary positions: worked by hand, against complex numbers, and against transformers for every scaling."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refimpl.model.config import Config, Rope
from refimpl.model.config_json import read_config
from refimpl.model.rope import Rotary, attention_factor, inverse_frequencies, rotate
from tests.model.conftest import ROPES, SIZES

CONFIG = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_positions=64)


def turned(x, positions, rotary=None):
    return rotate(x, *(rotary or Rotary(CONFIG))(positions, x.dtype))


def test_a_turn_is_a_complex_product(generator):
    """Oracle: `rope` Eq. (12): pair i as a complex number times exp(i m theta_i); the pairs are (i, i + head_dim / 2)."""
    x = torch.randn(2, 3, 5, 8, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 300]])
    angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(4) / 4)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    assert_close(turned(x, positions), torch.cat((z.real, z.imag), dim=-1), atol=1e-5, rtol=1e-5)
    neighbours = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert not torch.allclose(turned(x, positions), torch.view_as_real(neighbours).flatten(-2), atol=0.1)  # control


def test_scores_depend_on_distances_only(generator):
    """Oracle: `rope` Eq. (11)."""
    q, k = torch.randn(2, 1, 1, 5, 8, generator=generator)
    at = torch.arange(5)[None]
    scores = turned(q, at) @ turned(k, at).mT
    assert_close(turned(q, at + 40) @ turned(k, at + 40).mT, scores, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(turned(q, at + 40) @ turned(k, at).mT, scores, atol=0.1)


@pytest.mark.parametrize("name", sorted(ROPES.keys() - {"default"}))
@pytest.mark.parametrize("length", [None, 40, 64, 65, 200])
def test_frequencies_equal_those_of_transformers(tmp_path, name, length):
    """Peer: transformers 5.23.0, ROPE_INIT_FUNCTIONS."""
    theirs = LlamaConfig(**SIZES, rope_parameters=ROPES[name], architectures=["LlamaForCausalLM"])
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](theirs, None, seq_len=length)
    assert_close(inverse_frequencies(ours.rope, 8, 64, length), frequencies, atol=0, rtol=1e-6)
    assert attention_factor(ours.rope) == pytest.approx(factor)
    plain = inverse_frequencies(Rope(theta=ours.rope.theta), 8, 64)
    assert torch.equal(inverse_frequencies(ours.rope, 8, 64, length), plain) == (
        name == "dynamic" and (length or 0) <= 64
    )


def test_scalings_worked_by_hand():
    """Oracle: by hand. Wavelengths of 2 pi and 200 pi about a context of 64: the first kept, the second divided."""
    for rope in (
        Rope(theta=1e4, type="llama3", factor=4.0, original_max_positions=64),
        Rope(theta=1e4, type="yarn", factor=4.0, original_max_positions=64, beta_fast=8.0, truncate=False),
    ):
        assert_close(inverse_frequencies(rope, 4, 256), torch.tensor([1.0, 0.01 / 4]))
    assert_close(inverse_frequencies(Rope(theta=1e4, type="linear", factor=4.0), 4, 256), torch.tensor([0.25, 0.0025]))
    stretched = inverse_frequencies(Rope(theta=1e4, type="dynamic", factor=2.0), 4, 100, 150)
    assert_close(stretched, torch.tensor([1.0, 1 / (100 * 2.0)]))  # theta * (2 * 1.5 - 1) ** (4 / 2), to the power -1/2
    assert attention_factor(Rope(type="yarn", factor=math.e**2, original_max_positions=8)) == pytest.approx(1.2)


def test_dynamic_frequencies_are_those_of_each_row():
    """Oracle: a batch equals its rows one by one, and no call sees the one before."""
    rotary = Rotary(Config(**{**vars(CONFIG), "rope": Rope(type="dynamic", factor=4.0)}))
    long, short = torch.arange(100)[None], torch.arange(100)[None] - 60
    both = rotary(torch.cat((long, short)), torch.float32)
    for row, positions in enumerate((long, short)):
        for whole, alone in zip(both, rotary(positions, torch.float32), strict=True):
            assert_close(whole[row : row + 1], alone)
    assert not torch.allclose(both[0][0, :, 30], both[0][1, :, 90], atol=1e-3)


def test_frequencies_stay_float32():
    """Oracle: float64. In bfloat16 the angle at position 1000 would be off by whole radians."""
    cos, _ = Rotary(CONFIG)(torch.tensor([[1000]]), torch.float32)
    assert_close(
        cos.flatten()[1].double(), torch.tensor(1000 * 10000.0**-0.25, dtype=torch.float64).cos(), atol=1e-4, rtol=0
    )
    cos, _ = Rotary(CONFIG)(torch.tensor([[1000]]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert_close(cos.flatten()[1].double(), torch.tensor(100.0, dtype=torch.float64).cos(), atol=4e-3, rtol=0)
