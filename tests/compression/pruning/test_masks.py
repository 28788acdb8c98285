"""Masks under a constraint: the penalty in closed form, and multipliers that enforce it."""

import math

import torch
from torch.testing import assert_close

from refimpl.compression.pruning.gates import KINDS, Shape, shape_of
from refimpl.compression.pruning.masks import Masks
from tests.compression.conftest import decoder


def test_penalty_by_definition():
    """Oracle: the sum written out, with the probability of an open gate in closed form; multipliers and targets by hand."""
    masks = Masks(
        shape_of(decoder()), Shape(d_model=16, n_layers=3, n_kv_heads=1, d_ff=10), torch.Generator().manual_seed(0)
    )
    generator, expected = torch.Generator().manual_seed(1), 0.0
    targets = {"hidden": 0.5, "blocks": 0.25, "heads": 0.5, "inner": 0.75}
    for kind in KINDS:
        masks.log_alpha[kind].data = torch.randn(masks.log_alpha[kind].shape, generator=generator)
        first, second = masks.multipliers[kind].data = torch.rand(2, generator=generator)
        opened = torch.sigmoid(masks.log_alpha[kind] - 2 / 3 * math.log(0.1 / 1.1))
        off = 1 - opened.view(-1, opened.shape[-1]).mean(1) - 0.4 * targets[kind]
        expected += (first * off + second * off**2).mean()
    assert_close(masks.penalty(0.4), expected)
    assert masks.targets == targets


def test_gates_meet_their_constraints():
    """Oracle: the constraint. Descent of the gates and ascent of the multipliers, in 400 steps, end at every target; without the ascent
    of the multipliers nothing closes."""
    target = Shape(d_model=20, n_layers=4, n_kv_heads=1, d_ff=30)
    for ascent in (True, False):
        masks = Masks(shape_of(decoder()), target, torch.Generator().manual_seed(0))
        gates = {"params": list(masks.log_alpha.values()), "lr": 1.0}
        multipliers = {"params": list(masks.multipliers.values()), "lr": 1.0, "maximize": ascent}
        optimizer = torch.optim.Adam([gates, multipliers], betas=(0.9, 0.95))
        for step in range(400):
            masks.clamp_()
            optimizer.zero_grad()
            masks.penalty(min(1.0, step / 80)).backward()
            for group in optimizer.param_groups:
                group["lr"] = 1 - 0.9 * step / 400
            optimizer.step()
        off = torch.stack([(masks.sparsity(kind).detach() - masks.targets[kind]).abs().max() for kind in KINDS])
        assert (off < 0.04).all() == ascent


def test_noise_is_drawn_and_kept_within_bounds():
    """Oracle: the generator. The same noise gives the same gates; log alpha ends at log 100 either way."""
    shape = shape_of(decoder())
    masks = Masks(shape, shape, torch.Generator().manual_seed(0))
    masks.log_alpha["inner"].data[:2] = torch.tensor([[9.0], [-9.0]])
    masks.clamp_()
    assert_close(masks.log_alpha["inner"].abs()[:2].detach(), torch.full((2, 40), math.log(100.0)))
    first, same, other = (masks.draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["inner"], same["inner"]) and not torch.equal(first["inner"], other["inner"])
    assert (first["inner"][1] == 0).float().mean() > 0.8
