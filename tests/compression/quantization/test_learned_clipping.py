"""Learned clipping: round-to-nearest where nothing is clipped, gradients written out, and what is held is what was learned."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.learned_clipping import LearnedClipping, rounded
from refimpl.compression.quantization.weight_only.rtn import RTN


@pytest.mark.parametrize("group_size", [None, 4, 5])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_without_clipping_it_is_round_to_nearest(bits, group_size, generator):
    """Oracle: RTN, codes and bytes; where learning begins, ranges are 2 % narrower."""
    weight = torch.randn(6, 12, generator=generator)
    weight[2] = 0
    theirs = RTN(bits=bits, granularity="group" if group_size else "channel", group_size=group_size or 12)(weight)
    ours = LearnedClipping((6, 12), bits, group_size, strength=float("inf")).held(weight, torch.float32)
    assert torch.equal(ours.dense(), theirs.dense()) and ours.nbytes == theirs.nbytes
    clipped = LearnedClipping((6, 12), bits, group_size).held(weight, torch.float32)
    some = theirs.scale > 1e-4  # not the row of zeros
    narrower = theirs.scale.float() / (1 + torch.e**-4)
    assert_close(clipped.scale.float()[some], narrower[some], rtol=2e-3, atol=0)  # float16


@pytest.mark.parametrize("group_size", [None, 5])
def test_what_is_learned_is_what_is_held(group_size, generator):
    """Oracle: the packed weight, for any strengths."""
    clipping = LearnedClipping((6, 12), 3, group_size)
    with torch.no_grad():
        for parameter in clipping.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight = torch.randn(6, 12, generator=generator)
    assert torch.equal(clipping(weight), clipping.held(weight, torch.float32).dense())
    assert clipping.held(weight, torch.bfloat16).dense().dtype == torch.bfloat16


def test_half_of_the_range_by_hand():
    """Oracle: by hand. sigma(0) = 1/2: of [-2, 4] remains [-1, 2], three steps of 1, zero point 1."""
    clipping = LearnedClipping((1, 4), 2, strength=0.0)
    assert clipping(torch.tensor([[-2.0, 0.4, 1.6, 4.0]])).tolist() == [[-1, 0, 2, 2]]


def test_gradients_by_closed_form(generator):
    r"""Oracle: closed form. With h the step, z the zero point and G the gradient of the output: dL/dh sums G (round(w/h) - w/h)
    inside of the range and G (q - z) beyond; h = (sigma(u) max - sigma(l) min) / (2^b - 1) gives the rest by the chain rule.
    """
    clipping = LearnedClipping((5, 9), 3, scale_dtype=torch.float32)
    with torch.no_grad():
        clipping.upper.copy_(torch.randn(5, generator=generator))
        clipping.lower.copy_(torch.randn(5, generator=generator))
    weight = torch.randn(5, 9, generator=generator, requires_grad=True)
    g = torch.randn(5, 9, generator=generator)
    torch.autograd.backward((clipping(weight) * g).sum())
    with torch.no_grad():
        u, v, top, bottom = clipping.upper.sigmoid(), clipping.lower.sigmoid(), weight.amax(1), weight.amin(1)
        h = ((u * top - v * bottom) / 7)[:, None]
        z = (-v * bottom / h[:, 0]).round()[:, None]
        q = (weight / h).round() + z
        inside = (q >= 0) & (q <= 7)
        assert 5 < inside.sum() < 40  # both kinds occur
        by_h = (g * torch.where(inside, (weight / h).round() - weight / h, q.clamp(0, 7) - z)).sum(1)
        assert_close(clipping.upper.grad, by_h * top / 7 * u * (1 - u), rtol=1e-4, atol=1e-5)  # float32
        assert_close(clipping.lower.grad, -by_h * bottom / 7 * v * (1 - v), rtol=1e-4, atol=1e-5)
        by_weight = torch.where(inside, g, 0.0)
        rows = torch.arange(5)
        by_weight[rows, weight.argmax(1)] += by_h * u / 7
        by_weight[rows, weight.argmin(1)] -= by_h * v / 7
    assert_close(weight.grad, by_weight, rtol=1e-4, atol=1e-5)


def test_values_of_activations_are_those_of_the_integer_product(generator):
    """Oracle: `Activations`, which the held layer reads with."""
    from refimpl.compression.quantization.activations import Activations

    x = torch.randn(6, 11, generator=generator)
    x[3] = 0
    codes, scale = Activations(bits=4, symmetric=False).quantize(x)
    assert torch.equal(rounded(x, x.amin(1), x.amax(1), 4, torch.float32), codes * scale)
