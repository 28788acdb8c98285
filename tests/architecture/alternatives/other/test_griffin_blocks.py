"""Griffin's blocks: the recurrent block with loops, the initial values, the window's cache, the feed-forward, the norm."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.other.griffin_blocks import (
    AttentionBlock,
    GatedMLP,
    RecurrentBlock,
    ZeroCentredRMSNorm,
)
from refimpl.architecture.alternatives.protocol import state_bytes


def gelu(x):
    """The tanh form that the official code takes."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_recurrent_block_equals_its_equations(generator):
    """Oracle: Section 2.3 and Eqs. (1) to (4), one head, channel and position after the other, in float64."""
    block = RecurrentBlock(4, 6, 2, 3, generator).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.7, generator=generator)
    x = torch.randn(1, 7, 4, generator=generator, dtype=torch.float64)
    p = {name: parameter.detach() for name, parameter in block.named_parameters()}
    u = x[0] @ p["linear_x.weight"].T + p["linear_x.bias"]
    h, out = torch.zeros(6, dtype=torch.float64), []
    for t in range(7):
        c = p["conv_1d.bias"].clone()
        for back in range(min(3, t + 1)):
            c = c + p["conv_1d.weight"][:, 0, 2 - back] * u[t - back]
        r, i = (
            torch.cat(
                [c[3 * n : 3 * n + 3] @ p[f"{gate}_weight"][n] + p[f"{gate}_bias"][n] for n in range(2)]
            ).sigmoid()
            for gate in ("recurrent_gate", "input_gate")
        )
        a = torch.sigmoid(-p["recurrent_param"]) ** (8 * r)
        h = i * c if t == 0 else a * h + (1 - a**2).sqrt() * i * c
        y = h * gelu(p["linear_y.weight"] @ x[0, t] + p["linear_y.bias"])
        out.append(p["linear_out.weight"] @ y + p["linear_out.bias"])
    assert_close(block(x)[0], torch.stack(out))


def test_initial_values(generator):
    """Oracle: the official code's rules: a uniform in a^2 between 0.9 and 0.999, variances of 1/width, a quiet convolution."""
    block = RecurrentBlock(64, 4096, 16, 4, generator)
    a = torch.sigmoid(-block.recurrent_param)
    assert 0.9 < a.min() < 0.9005 and 0.9985 < a.max() < 0.999
    assert a.square().mean().item() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=2e-3)
    assert block.conv_1d.weight.std().item() == pytest.approx((0.01 / 4) ** 0.5, rel=0.02)
    assert block.input_gate_weight.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert block.linear_x.weight.std().item() == pytest.approx(1 / 8, rel=0.01)
    assert block.linear_out.weight.std().item() == pytest.approx(1 / 64, rel=0.01)
    for name, parameter in block.named_parameters():
        assert not name.endswith("bias") or not parameter.any()


def test_the_windows_cache(generator):
    """Oracle: the newest keys in the order of their positions, as a whole forward has them; by hand the bytes."""
    block = AttentionBlock(8, 2, 5, generator)
    x = torch.randn(2, 12, 8, generator=generator)
    _, whole = block.extend(x, block.initial_state(2))
    state = block.initial_state(2)
    for part in x.split([1, 3, 1, 7], dim=1):
        _, state = block.extend(part, state)
        assert state_bytes(state) == 2 * (2 * 5 * 4 * 4) + 8
    assert_close(state, whole)
    assert state.seen == 12
    assert_close(state.values, block.v_proj(x[:, -5:]))
    late = torch.cat(
        (x[:, :6] + 1, x[:, 6:]), dim=1
    )  # what the last position can't see: itself and 5 before are 6 to 11
    assert_close(block(late)[:, -1], block(x)[:, -1])
    assert (block(late)[:, -2] - block(x)[:, -2]).abs().max() > 1e-3  # negative control: position 10 sees 5


def test_gated_mlp_and_norm(generator):
    """Oracle: the formulas; a feed-forward keeps nothing."""
    mlp, x = GatedMLP(4, 6, generator), torch.randn(2, 3, 4, generator=generator)
    expected = mlp.down_proj(gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert_close(mlp(x), expected)
    assert_close(mlp.step(x[:, 1], ()), (expected[:, 1], ()))
    assert state_bytes(mlp.initial_state(2)) == 0
    norm = ZeroCentredRMSNorm(4, 1e-6)
    norm.weight.data = torch.tensor([0.0, 1.0, -1.0, 0.5])
    assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.tensor([1, 2, 0, 1.5]))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="lru_width=6 must be a multiple of n_heads=4"):
        RecurrentBlock(8, 6, 4, 4, None)
    with pytest.raises(ValueError, match=r"d_model=12 must be a multiple of 4 \* n_heads=8"):
        AttentionBlock(12, 2, 4, None)
