"""Groups with a scale and a minimum: by hand, within half a step, in 16 bits."""

import numpy as np
import pytest
import torch

from refimpl.inference.kv_cache.quantized.groups import dequantize, quantize


def back(x, dim, bits):
    codes, scale, minimum = quantize(x, dim, bits)
    return dequantize(codes, scale, minimum, torch.empty_like(x)), scale


def test_worked_by_hand():
    """Oracle: by hand: columns from 0 to 3 and from -10 to 20 in 3 steps; 0.4 goes down, 1.6 up, -4 to -10 + 10."""
    x = torch.tensor([[0.0, -10.0], [0.4, -4.0], [1.6, 4.0], [3.0, 20.0]])
    codes, scale, minimum = quantize(x, 0, 2)
    assert codes.tolist() == [[0, 0], [0, 1], [2, 1], [3, 3]]
    assert scale.tolist() == [[1.0, 10.0]]
    assert minimum.tolist() == [[0.0, -10.0]]
    assert back(x, 0, 2)[0].tolist() == [[0.0, -10.0], [0.0, 0.0], [2.0, 0.0], [3.0, 20.0]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0])
def test_error_is_at_most_half_a_step(bits, offset, generator):
    """Oracle: a theorem, with the scale that is stored: rounding inside the range moves nothing by more than s / 2."""
    x = torch.randn(50, 33, generator=generator, dtype=torch.float64) + offset
    rebuilt, scale = back(x, 1, bits)
    steps = (rebuilt - x).abs() / scale.double()
    assert steps.max() <= 0.5 + 1e-6
    assert steps.max() > 0.45  # negative control: the bound is used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_grid_has_16_bits_and_covers_the_group(dtype, generator):
    """Oracle: exact arithmetic: minimum <= least, and minimum + (2^bits - 1) scale >= greatest; one unit less of either misses."""
    x = (torch.randn(200, 32, generator=generator) * 3 + torch.randn(200, 1, generator=generator) * 20).to(dtype)
    _, scale, minimum = quantize(x, 1, 2)
    assert scale.dtype == minimum.dtype == (dtype if dtype.itemsize == 2 else torch.float16)
    low, high, s, m = (t.double() for t in (x.amin(1, True), x.amax(1, True), scale, minimum))
    assert (m <= low).all()
    assert (m + 3 * s >= high - 1e-5).all()
    lower = scale.nextafter(torch.zeros_like(scale)).double()
    assert (m + 3 * lower < high + 1e-5).all()
    higher = minimum.nextafter(torch.full_like(minimum, float("inf"))).double()
    assert (higher > low).all()


def test_equals_numpy(generator):
    """Oracle: a loop in NumPy over groups, with its own half precision."""
    x = torch.randn(40, 16, generator=generator) * 5 + 3
    codes, scale, minimum = quantize(x, 1, 4)
    for row, got, s, m in zip(x.numpy(), codes, scale, minimum, strict=True):
        low = np.float16(row.min())
        if low > row.min():
            low = np.nextafter(low, np.float16(-np.inf))
        step = np.float32(row.max() - np.float32(low)) / np.float32(15)
        half = np.float16(step)
        if half < step:
            half = np.nextafter(half, np.float16(np.inf))
        assert (float(low), float(half)) == (float(m), float(s))
        assert got.tolist() == np.clip(np.rint((row - np.float32(low)) / np.float32(half)), 0, 15).astype(int).tolist()


@pytest.mark.parametrize("value", [0.0, 2.5, -7.25, 1e-30])
def test_equal_numbers(value):
    """Oracle: the number itself, as near as 16 bits come."""
    x = torch.full((3, 8), value)
    assert (back(x, 1, 2)[0] - x).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "x", [torch.tensor([[1e6, 0.0]]), torch.tensor([[0.0, float("nan")]]), torch.tensor([[float("inf"), 0.0]])]
)
def test_what_16_bits_do_not_express(x):
    with pytest.raises(ValueError, match=r"do not fit a grid in torch\.float16; move the model to bfloat16"):
        quantize(x, 1, 2)
    assert quantize(torch.tensor([[1e6, 0.0]]).bfloat16(), 1, 2)[0].tolist() == [[3, 0]]
