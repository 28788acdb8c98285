"""Divergences from logarithms: against torch, by hand, and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.compression.distillation.divergence import kl, log_mixture


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_kl_by_hand():
    """Oracle: by hand: 1/4 log(1/2) + 3/4 log(3/2); the other way 1/2 log 2 + 1/2 log(2/3)."""
    p, q = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    assert_close(kl(p, q).item(), 0.25 * math.log(0.5) + 0.75 * math.log(1.5), rtol=1e-6, atol=1e-6)
    assert_close(kl(q, p).item(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rtol=1e-6, atol=1e-6)


def test_a_token_that_both_rule_out_changes_nothing(generator):
    """Oracle: the distributions without it, as where a vocabulary is padded; gradients are finite."""
    p, q = draw(generator, 4, 7), draw(generator, 4, 7)
    padded = [F.pad(x, (0, 2), value=-torch.inf).requires_grad_() for x in (p, q)]
    divergence = kl(*padded)
    assert_close(divergence, kl(p, q))
    divergence.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in padded)


def test_kl_is_that_of_torch(generator):
    """Oracle: torch's `kl_div`; and finite differences for the gradients of both arguments."""
    p, q = draw(generator, 3, 5, 7), draw(generator, 3, 5, 7)
    assert_close(kl(p, q), F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert kl(p, p).abs().max() < 1e-15 and (kl(p, q) > 0).all()
    arguments = tuple(x[0, :2].clone().requires_grad_() for x in (p, q))
    assert torch.autograd.gradcheck(lambda x, y: kl(x.log_softmax(-1), y.log_softmax(-1)), arguments)


def test_tokens_that_one_rules_out(generator):
    """Oracle: 0 log 0 = 0, with a finite gradient; and infinity where only the second rules a token out."""
    p, q = draw(generator, 4), draw(generator, 4).requires_grad_()
    out = p.clone()
    out[1] = float("-inf")
    rest = [0, 2, 3]
    assert_close(kl(out, q), (p[rest].exp() * (p[rest] - q[rest])).sum())
    (gradient,) = torch.autograd.grad(kl(out, q), q)
    assert_close(gradient, -out.exp())
    assert kl(q.detach(), out) == float("inf")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_mixtures(generator, share):
    """Oracle: probabilities mixed and their logarithm taken; and finite differences."""
    p, q = draw(generator, 3, 5), draw(generator, 3, 5)
    assert_close(log_mixture(p, q, share), (share * p.exp() + (1 - share) * q.exp()).log())
    arguments = tuple(x.clone().requires_grad_() for x in (p, q))
    assert torch.autograd.gradcheck(lambda x, y: log_mixture(x, y, share), arguments)


def test_mixtures_of_tiny_chances_stay_exact():
    """Oracle: by hand: log(e^-200 / 2 + e^-200 / 2) = -200, where float32 probabilities are 0."""
    tiny = torch.tensor([-200.0])
    assert_close(log_mixture(tiny, tiny, 0.5), tiny)
    assert tiny.exp() == 0
