"""Quantized weights: stored bytes and dense values by hand."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.affine import to_groups
from refimpl.compression.quantization.packed import QuantizedWeight


def quantized(codes, scale, zero, bits, granularity, group_size=8, dtype=torch.float32):
    """The weight of codes `[out, in]`."""
    groups = to_groups(codes, granularity, group_size)
    zero = None if zero is None else torch.tensor(zero)
    shape = (codes.shape[0], codes.shape[1])
    return QuantizedWeight(
        groups, torch.tensor(scale), zero, bits=bits, granularity=granularity, shape=shape, dtype=dtype
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", 1), ("channel", 1), ("group", 4), ("group", 3)])
def test_codes_are_one_long_integer(bits, granularity, group_size, generator):
    """Oracle: Python's integers. 35 codes, channel after channel, whatever shares a scale; only their end is filled up."""
    codes = torch.randint(0, 2**bits, (5, 7), generator=generator, dtype=torch.uint8)
    n = {"tensor": 1, "channel": 5, "group": 5 * -(-7 // group_size)}[granularity]
    weight = quantized(codes, [1.0] * n, None, bits, granularity, group_size)
    number = sum(code << i * bits for i, code in enumerate(codes.flatten().tolist()))
    assert bytes(weight.codes.tolist()) == number.to_bytes(5 * bits, "little")
    assert torch.equal(weight.dense(), codes.float() - 2 ** (bits - 1))


def test_dense_by_hand():
    """Oracle: by hand, (code - zero) * scale of each group of two; the second channel's last group has one column."""
    codes = torch.tensor([[0, 3, 1], [2, 2, 3]], dtype=torch.uint8)
    weight = quantized(codes, [1.0, 0.5, 2.0, 10.0], [1.0, 0.0, 3.0, 2.0], 2, "group", 2, torch.float64)
    assert_close(weight.dense(), torch.tensor([[-1.0, 2.0, 0.5], [-2.0, -2.0, 10.0]], dtype=torch.float64))
    assert weight.codes.tolist() == [0 + 3 * 4 + 1 * 16 + 2 * 64, 2 + 3 * 4]
    assert weight.zero.tolist() == [1 + 0 * 4 + 3 * 16 + 2 * 64, 0]
    assert weight.nbytes == 2 + 2 + 4 * 4


def test_a_symmetric_grid_has_its_zero_in_the_middle():
    """Oracle: by hand; with one scale for all, 2 is the middle of 0 to 3."""
    weight = quantized(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8), [0.5], None, 2, "tensor")
    assert weight.dense().tolist() == [[-1.0, -0.5], [0.0, 0.5]]
    assert "zero" not in weight.state_dict()
