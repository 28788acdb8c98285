"""Observers: shares of ranges by brute force, thresholds by the slides' definition, and both where they are used."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.activations import Activations, integer_weight
from refimpl.compression.quantization.affine import affine_grid, dequantize, quantize
from refimpl.compression.quantization.observers import best_range, kl_range, mse_range, zero_filled
from tests.compression.quantization.test_divergence import divergences


def brute(values, bits, symmetric, norm):
    """The share of the range, of 1, 0.99, ... 0.01, with which the grid's codes and values, as they are defined, err least."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    costs = []
    for k in range(100):
        share = 1 - k / 100
        ends = torch.tensor([share * low]), torch.tensor([share * high])
        grid = affine_grid(*ends, bits, symmetric=symmetric, scale_dtype=torch.float32)
        moved = dequantize(quantize(values[None], *grid, bits), *grid) - values
        costs.append(float(moved.double().abs().pow(norm).sum()))
    best = 1 - int(np.argmin(costs)) / 100
    return best * low, best * high


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "norm"), [(2, 2.0), (3, 2.4)])
def test_no_other_share_errs_less(bits, norm, symmetric, generator):
    """Oracle: brute force over all shares, with codes."""
    values = torch.randn(4, 50, generator=generator)
    values[0] += 1
    values[1, 3] = 9
    low, high = mse_range(values, bits, symmetric=symmetric, norm=norm)
    for row, *found in zip(values, low.tolist(), high.tolist(), strict=True):
        assert found == pytest.approx(brute(row, bits, symmetric, norm))
    assert (high < values.amax(dim=1) * 0.95).any()  # negative control: something is clipped


@pytest.mark.parametrize("least", [1, 3])
def test_the_last_share_is_tried(least):
    """Oracle: by hand. A single level errs least at the median, 0.1, and the least share is the nearest to it."""
    values = torch.tensor([0.1] * 9 + [1.0])
    _, high = best_range(values, lambda _low, high: high.expand(10), norm=1.0, steps=10, least=least)
    assert float(high) == pytest.approx(least / 10)


def test_activations_take_the_ranges(generator):
    """Oracle: brute force with the quantizer itself, a static grid and one for each token; codes do not leave the range."""
    inputs = torch.randn(6, 40, generator=generator)
    inputs[2, 5] = 7.0
    static = Activations(bits=3, scope="static", symmetric=False)

    def rounded(low, high):
        codes, scale = static.quantize(inputs.flatten(), static.grid(low, high))
        return codes * scale

    reach = best_range(inputs.flatten(), rounded)
    held = integer_weight(torch.eye(40), static, reach=reach)
    errors = [
        float((rounded(share * inputs.min(), share * inputs.max()) - inputs.flatten()).square().sum())
        for share in torch.arange(1, 101) / 100
    ]
    assert float((held.read(inputs) - inputs).square().sum()) == pytest.approx(min(errors), rel=1e-5)
    assert min(errors) < 0.7 * errors[-1]  # negative control: something is clipped
    whole = integer_weight(torch.eye(40), static, reach=(inputs.min(), inputs.max()))
    assert held.read(inputs).max() < 5 < 6.5 < whole.read(inputs).max()
    tokens = Activations(bits=3, symmetric=False)
    low, high = mse_range(inputs, 3)
    codes, scale = tokens.quantize(inputs, tokens.grid(low[:, None], high[:, None]))
    moved, (codes, scale) = (codes * scale - inputs).square().sum(dim=1), tokens.quantize(inputs)
    unclipped = (codes * scale - inputs).square().sum(dim=1)
    assert (moved <= unclipped * (1 + 1e-5)).all() and (moved < 0.95 * unclipped).any()


def test_a_threshold_ends_in_the_middle_of_a_bin():
    """Oracle: by hand, from the definition: T = (i + 1/2) times the width, on a histogram whose i is known by `divergences`."""
    values = torch.special.ndtri(torch.linspace(0.01, 0.99, 999, dtype=torch.float64)).float()
    values[-1] = 10.0
    low, high = kl_range(values, 4, bins=64)
    counts, _ = np.histogram(values.abs().numpy(), bins=64, range=(0, 10))
    counts[0] = counts[1]
    expected = divergences(counts.tolist(), 8)
    threshold = (min(expected, key=expected.get) + 0.5) * 10 / 64
    assert float(high) == pytest.approx(threshold) and float(low) == pytest.approx(max(-threshold, float(values.min())))
    assert threshold < 4
    assert kl_range(-values, 4, bins=64) == (-high, -low)  # below 0 too


def test_zeros_do_not_move_the_threshold(generator):
    """Oracle: the numbers without them."""
    values = torch.randn(500, generator=generator)
    padded = torch.cat([values, torch.zeros(2000)])
    assert kl_range(padded, 4) == kl_range(values, 4)
    assert_close(mse_range(padded, 4), mse_range(values, 4))


@pytest.mark.parametrize("observer", [mse_range, kl_range])
def test_shapes_dtypes_and_empty_ranges(observer, generator):
    """Oracle: rows one by one; zeros have the range [0, 0], a constant its own."""
    values = torch.randn(2, 3, 17, generator=generator).bfloat16()
    before = values.clone()
    low, high = observer(values, 4)
    assert low.shape == high.shape == (2, 3) and low.dtype == torch.float32
    assert (low <= 0).all() and (high >= 0).all() and torch.equal(values, before)
    assert (float(low[1, 2]), float(high[1, 2])) == tuple(map(float, observer(values[1, 2], 4)))
    assert [x.tolist() for x in observer(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), 4)] == [[0, 0], [0, 3]]


def test_rows_do_not_depend_on_how_many_are_taken_at_once(generator):
    """Oracle: the last row alone; 8 bits of 20 rows are taken in two parts."""
    values = torch.randn(20, 300, generator=generator)
    assert [float(x[-1]) for x in kl_range(values, 8)] == [float(x) for x in kl_range(values[-1], 8)]


def test_groups_are_filled_up_with_zeros():
    """Oracle: by hand; channels and tensors are as they are."""
    weight = torch.arange(1.0, 7.0).view(2, 3)
    assert zero_filled(weight, "group", 2).tolist() == [[1, 2], [3, 0], [4, 5], [6, 0]]
    assert torch.equal(zero_filled(weight, "channel", 2), weight)
    assert zero_filled(weight, "tensor", 2).shape == (1, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: kl_range(torch.ones(3), 1), "bits=1 must be 2 to 8"),
        (lambda: kl_range(torch.ones(3), 8, bins=64), "levels=128 must be 2 to 64, the number of bins"),
        (lambda: mse_range(torch.ones(3), 0), "bits=0 must be 1 to 8"),
        (lambda: mse_range(torch.ones(2, 0), 4), r"values of shape \(2, 0\) must be \[..., n\] with n >= 1"),
        (lambda: mse_range(torch.tensor([1.0, torch.nan]), 4), "values hold NaN or infinity"),
        (lambda: kl_range(torch.tensor([1.0, torch.inf]), 4), "values hold NaN or infinity"),
        (lambda: best_range(torch.tensor([torch.nan]), lambda low, high: low), "values hold NaN or infinity"),
        (lambda: mse_range(torch.full((3,), 1e8), 2, scale_dtype=torch.float16), r"use scale_dtype=torch\.float32"),
    ],
)
def test_what_is_wrong_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
