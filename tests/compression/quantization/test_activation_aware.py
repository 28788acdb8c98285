"""Factors and limits chosen by activations: brute force over exponents, and over limits token by token."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.activation_aware import (
    ScaledWeight,
    best_factors,
    clipped,
    factors,
    half,
    on_grids,
    output_error,
)
from refimpl.compression.quantization.weight_only.rtn import RTN


def layer(generator, out=5, columns=12, rows=40):
    """A weight and inputs, two channels of them 20 times as large."""
    weight, inputs = torch.randn(out, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    inputs[:, [3, 8]] *= 20
    return weight, inputs


def test_factors_by_hand():
    """Oracle: by hand: 16^0.75 = 8, 81^0.75 = 27, divided by sqrt(27 * 8); a channel without input has 1e-4 before that."""
    root = (27 * 8) ** 0.5
    assert_close(factors(torch.tensor([16.0, 81.0]), 0.75), torch.tensor([8 / root, 27 / root]))
    assert_close(factors(torch.tensor([0.0, 1.0]), 0.5), torch.tensor([1e-2, 1e2]))
    assert factors(torch.tensor([0.0, 7.0]), 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("bits", [2, 3])
def test_no_other_exponent_errs_less(bits, generator):
    """Oracle: brute force in float64 over the exponents 0 to 0.95, with round-to-nearest's own weights and outputs of all tokens."""
    weight, inputs = layer(generator)
    mean = inputs.abs().mean(dim=0).double()
    errors = {}
    for i in range(20):
        s = mean ** (i / 20)
        s /= (s.max() * s.min()).sqrt()
        dense = RTN(bits=bits, group_size=4)((weight * s).float()).dense().double() / s
        errors[i] = float((inputs.double() @ (dense - weight).T).square().sum())
    best = min(errors, key=errors.get)
    error = output_error(weight, inputs, lambda w: on_grids(w, bits, 4, torch.float16))
    found = best_factors(inputs.abs().mean(dim=0), error)
    assert_close(found, factors(mean.float(), best / 20))
    assert error(found) == pytest.approx(errors[best], rel=1e-3)
    assert best > 0 and errors[best] < 0.7 * errors[0]  # negative control


@pytest.mark.parametrize(("columns", "rows"), [(12, 40), (10, 7), (8, 1200)])
def test_no_other_limit_errs_less(columns, rows, generator):
    """Oracle: brute force, group by group and token by token: ten limits from the largest down; a shorter last group; every second
    token of 1,200."""
    weight, inputs = layer(generator, columns=columns, rows=rows, out=3) if columns > 8 else (
        torch.randn(3, 8, generator=generator), torch.randn(rows, 8, generator=generator)
    )  # fmt: skip
    seen = inputs[::2] if rows == 1200 else inputs
    found, clips = clipped(weight, inputs, 2, 4), 0
    for row in range(3):
        for start in range(0, columns, 4):
            group, x = weight[row, start : start + 4], seen[:, start : start + 4]
            tried = {}
            for i in range(10):
                limit = float(group.abs().max()) * (1 - i / 20)
                dense = RTN(bits=2, group_size=4)(group.clamp(-limit, limit)[None]).dense()[0]
                tried[limit] = float((x @ (dense - group)).double().square().sum())
            best = min(tried, key=tried.get)
            clips += best < float(group.abs().max())
            assert_close(found[row, start : start + 4], group.clamp(-best, best))
    assert clips > 0  # negative control


def test_scaled_weights_divide_their_inputs(generator):
    """Oracle: by hand: dense is the quantized weight over the factors, and the bytes are its own and two for each factor."""
    weight, inputs = layer(generator)
    factor = torch.rand(12, generator=generator).add(0.5).half()
    low = RTN(bits=4, group_size=4)(weight * factor)
    held = ScaledWeight(low, factor)
    assert_close(held.dense(), low.dense() / factor)
    assert held.nbytes == low.nbytes + 24
    assert_close(held.multiply(inputs), inputs @ held.dense().T, rtol=1e-4, atol=1e-4)
    small = ScaledWeight(RTN(bits=4, group_size=4)((weight * factor).bfloat16()), factor.bfloat16())
    assert small.dense().dtype == small.multiply(inputs.bfloat16()).dtype == torch.bfloat16
    assert (half(weight), half(weight.bfloat16())) == (torch.float16, torch.bfloat16)
