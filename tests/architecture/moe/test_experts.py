"""Grouped experts: one token at a time, the substrate's feed-forward, initialization."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.architecture.moe.experts import Experts, draw
from refimpl.model.config import Config
from refimpl.model.model import SwiGLU


def token_by_token(experts, x, expert):
    """Oracle: each token with its own expert's matrices."""
    out = []
    for token, e in zip(x, expert.tolist(), strict=True):
        inner = experts.up_proj[e] @ token
        inner = inner.relu() if experts.gate_proj is None else F.silu(experts.gate_proj[e] @ token) * inner
        out.append(experts.down_proj[e] @ inner)
    return torch.stack(out)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize(
    "expert", [[0, 1, 2, 3] * 8, [3] * 33, [2, 0, 2, 2, 1, 0], [1], [3, 3, 3, 3, 3, 3, 3, 0]], ids=str
)
def test_equals_token_by_token(activation, expert, generator):
    """Oracle: brute force, with loads that are even, uneven, and an expert's alone."""
    experts = Experts(4, 5, 7, activation=activation, generator=generator, scale=1.0).double()
    x, expert = torch.randn(len(expert), 5, generator=generator, dtype=torch.float64), torch.tensor(expert)
    x.requires_grad_()
    ours, theirs = experts(x, expert), token_by_token(experts, x, expert)
    assert_close(ours, theirs)
    wanted = [x, *experts.parameters()]
    assert_close(torch.autograd.grad(ours.square().sum(), wanted), torch.autograd.grad(theirs.square().sum(), wanted))
    assert len(expert) == 1 or (ours[0] - experts(x, (expert + 1) % 4)[0]).abs().max() > 1e-3  # negative control


def test_mixed_precision(generator):
    """Oracle: the same in float32; what comes back has the tokens' dtype, whatever the products are computed in."""
    experts, x = Experts(3, 8, 16, generator=generator), torch.randn(9, 8, generator=generator)
    expert = torch.arange(9) % 3
    with torch.autocast("cpu", torch.bfloat16):
        ours = experts(x, expert)
    assert ours.dtype == torch.float32
    difference = (ours - experts(x, expert)).abs().max()
    assert 0 < difference < 0.01 * ours.abs().max()


def test_no_tokens():
    """Oracle: by hand: nothing goes in, nothing comes out."""
    assert Experts(3, 4, 5)(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 4)


def test_one_expert_is_the_substrates_feed_forward(generator):
    """Oracle: `refimpl.model.model.SwiGLU` with the same matrices."""
    sizes = {"vocabulary": 5, "d_model": 6, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 6, "d_ff": 9}
    dense, experts = SwiGLU(Config(**sizes)), Experts(2, 6, 9, generator=generator)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.copy_(getattr(experts, name)[1])
    x = torch.randn(11, 6, generator=generator)
    assert_close(experts(x, torch.ones(11, dtype=torch.long)), dense(x))
    assert_close(experts.one(x, 1), dense(x))


def test_initialization(generator):
    """Oracle: by hand. sigma = sqrt(0.1 / in); cut at 2 sigma the variance is 0.774 of it; nothing lies beyond."""
    weight = draw((8, 50, 40), 0.1, generator)
    sigma = (0.1 / 40) ** 0.5
    assert weight.abs().max().item() <= 2 * sigma
    assert weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.02)
    assert Experts(2, 40, 10, generator=generator).down_proj.abs().max().item() > 2 * sigma  # 10 inputs, a wider draw


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_experts": 0}, "n_experts=0"), ({"d_ff": 0}, "d_ff=0"), ({"activation": "gelu"}, "activation='gelu'")],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"n_experts": 2, "d_model": 3, "d_ff": 4} | change)
