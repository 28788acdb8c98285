"""The affine grid that all integer quantizers here share."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.affine import affine_grid, dequantize, from_groups, quantize, to_groups

WEIGHT = torch.arange(15.0).view(3, 5)


def test_groups_by_hand():
    """Oracle: by hand. A row of five in groups of two: the last group repeats its own last value."""
    assert to_groups(WEIGHT, "tensor", 2).shape == (1, 15)
    assert torch.equal(to_groups(WEIGHT, "channel", 2), WEIGHT)
    groups = to_groups(WEIGHT, "group", 2)
    assert groups[:3].tolist() == [[0, 1], [2, 3], [4, 4]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("group_size", [1, 2, 5, 7])
def test_groups_there_and_back(granularity, group_size):
    assert torch.equal(from_groups(to_groups(WEIGHT, granularity, group_size), (3, 5)), WEIGHT)


def test_grid_by_hand():
    """Oracle: by hand. [-1, 2] in 3 steps: scale 1, zero point 1. All positive [1, 3]: widened to [0, 3]."""
    scale, zero = affine_grid(
        torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 3.0]), 2, symmetric=False, scale_dtype=torch.float32
    )
    assert scale.tolist() == [1.0, 1.0]
    assert zero.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_up(dtype, generator):
    """Oracle: the definition. The stored scale is not below the exact one, and the next number below it is."""
    high = torch.rand(500, generator=generator) * 100 + 1e-3
    scale, _ = affine_grid(torch.zeros(500), high, 4, symmetric=False, scale_dtype=dtype)
    exact = high / 15
    assert (scale.float() >= exact).all()
    assert ((scale.view(torch.int16) - 1).view(dtype).float() < exact).all()


def test_zero_is_a_level(generator):
    """Oracle: what padding and pruned weights need. 0 comes back as 0 on every grid."""
    groups = torch.cat([torch.zeros(50, 1), torch.randn(50, 9, generator=generator) + 0.7], dim=1)
    for bits in (1, 2, 4, 8):
        for symmetric in (False, True):
            grid = affine_grid(groups.amin(1), groups.amax(1), bits, symmetric=symmetric, scale_dtype=torch.float16)
            values = dequantize(quantize(groups, *grid, bits), *grid)
            assert (values[:, 0] == 0).all()


def test_values_on_the_grid_are_fixed_points(generator):
    """Oracle: quantizing twice is quantizing once. Negative control: the first time something moves."""
    groups = torch.randn(20, 16, generator=generator)
    grid = affine_grid(groups.amin(1), groups.amax(1), 3, symmetric=False, scale_dtype=torch.float32)
    once = dequantize(quantize(groups, *grid, 3), *grid)
    assert_close(dequantize(quantize(once, *grid, 3), *grid), once)
    assert not torch.allclose(once, groups)
