"""Searches of grids: held by brute force over all candidates, and by hand."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.affine import affine_grid
from refimpl.compression.quantization.grid_search import moved_grid, shrunk_grid


def cost(values, scale, zero, bits):
    """Sum of |x - x'|^2.4 of one group, from the definition, number by number."""
    levels = [(q - zero) * scale for q in range(2**bits)]
    return sum(min(abs(x - level) for level in levels) ** 2.4 for x in values.tolist())


def skewed(generator, groups=3, size=9):
    """Groups with one number far out."""
    values = torch.randn(groups, size, generator=generator)
    values[:, 0] *= 4
    return values


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_other_width_or_place_is_better(bits, generator):
    """Oracle: brute force over ten widths and all zero points; groups so long that several of their extremes are looked at."""
    groups = skewed(generator, size=100)
    scale, zero = moved_grid(groups, bits, scale_dtype=torch.float32, steps=10)
    for values, s, z in zip(groups, scale.tolist(), zero.tolist(), strict=True):
        width = (max(0.0, float(values.max())) - min(0.0, float(values.min()))) / (2**bits - 1)
        tried = {
            (i, at): cost(values, width * i / 10, at, bits) for i, at in itertools.product(range(1, 11), range(2**bits))
        }
        best = min(tried, key=lambda key: tried[key])
        assert (s, z) == (pytest.approx(width * best[0] / 10), best[1])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_no_other_share_of_the_range_is_better(bits, symmetric, generator):
    """Oracle: brute force over the shares 1, 0.9, ... 0.3 of ten steps."""
    groups = skewed(generator)
    scale, zero = shrunk_grid(groups, bits, symmetric=symmetric, scale_dtype=torch.float32, steps=10)
    shares = [1 - i / 10 for i in range(8)]
    for k, values in enumerate(groups):
        low, high = values[None].min(1).values, values[None].max(1).values
        tried = [affine_grid(p * low, p * high, bits, symmetric=symmetric, scale_dtype=torch.float32) for p in shares]
        costs = [cost(values, float(s), float(z), bits) for s, z in tried]
        best = costs.index(min(costs))
        assert (float(scale[k]), float(zero[k])) == (pytest.approx(float(tried[best][0])), float(tried[best][1]))


def test_worked_by_hand():
    """Oracle: by hand, one bit. Levels 0 and s: 3 * |1 - s|^2.4 + (2 - s)^2.4 is 0.648 at 1.2, 0.626 at 1.4, 1.0 at 1.6."""
    scale, _ = shrunk_grid(
        torch.tensor([[1.0, 1.0, 1.0, 2.0]]), 1, symmetric=False, scale_dtype=torch.float32, steps=10
    )
    assert scale.tolist() == pytest.approx([1.4])


def test_a_fifth_of_the_range_is_never_given_up():
    """Oracle: by hand, one bit, 2000 numbers of 2 and one of 10. A step of 2.0 would lose 8^2.4 = 147 and is not tried, of 2.1 it is
    2000 * 0.1^2.4 + 7.9^2.4 = 151, of 2.2 2000 * 0.2^2.4 + 7.8^2.4 = 180."""
    values = torch.full((1, 2001), 2.0)
    values[0, 7] = 10
    scale, _ = shrunk_grid(values, 1, symmetric=False, scale_dtype=torch.float32)
    assert scale.tolist() == pytest.approx([2.1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_in_the_type_asked_for(dtype, generator):
    groups = skewed(generator).to(dtype)
    for scale, zero in (
        shrunk_grid(groups, 3, symmetric=False, scale_dtype=torch.float16),
        moved_grid(groups, 3, scale_dtype=torch.float16, steps=5),
    ):
        assert scale.dtype == torch.float16 and (scale > 0).all()
        assert ((zero >= 0) & (zero <= 7)).all()


def test_zeros_and_constants_are_kept():
    """Oracle: a range of 0 to c has c for a level."""
    groups = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-3.0, -3.0]])
    for scale, zero in (
        shrunk_grid(groups, 2, symmetric=False, scale_dtype=torch.float32),
        moved_grid(groups, 2, scale_dtype=torch.float32),
    ):
        levels = (torch.arange(4)[None] - zero[:, None]) * scale[:, None]
        assert_close((levels - groups[:, :1]).abs().min(dim=1).values, torch.zeros(3))


def test_what_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"use scale_dtype=torch\.float32"):
        moved_grid(torch.full((1, 3), 1e8), 2, scale_dtype=torch.float16)
