"""Bilevel codes: held by arithmetic written out, and by bytes counted."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.bilevel import BilevelWeight, Statistics
from refimpl.compression.quantization.outliers import Outliers


def test_worked_by_hand():
    """Oracle: by hand, 2 bits. From 1 to 7 in three steps of 2: 1, 2, 4.5, 7 become 1, 3 (or 1), 5, 7."""
    statistic = Statistics.of(torch.tensor([1.0, 2.5, 4.5, 7.0]), 2)
    assert statistic.codes.tolist() == [[0, 1, 2, 3]]
    assert statistic.values().tolist() == [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize("n", [1, 15, 16, 37])
def test_error_is_at_most_half_a_step_of_sixteen(n, generator):
    """Oracle: rounding inside a range; steps and least values are those of sixteen rows, the last few are a group too."""
    values = torch.rand(n, generator=generator) + 0.5
    statistic = Statistics.of(values, 3)
    assert statistic.step.shape == (1, -(-n // 16))
    for at in range(0, n, 16):
        part = values[at : at + 16]
        half = float(part.max() - part.min()) / 7 / 2
        off = (statistic.values()[at : at + 16] - part).abs().max()
        assert off <= half + 1e-3  # float16 of step and least value


def test_equal_scales_are_kept():
    """Oracle: a range of width 0 holds one value."""
    assert Statistics.of(torch.full((5,), 0.25), 3).values().tolist() == [0.25] * 5


def test_what_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"a scale of 1e\+08 is beyond torch\.float16"):
        Statistics.of(torch.full((5,), 1e8), 3)


def packed(generator, out=18, columns=20, size=8, order=None, share=0.1, dtype=torch.float32):
    """Codes, statistics and outliers drawn at random, and the dense weight by its definition."""
    codes = torch.randint(0, 8, (out, columns), generator=generator).to(torch.uint8)
    groups = -(-columns // size)
    scales, zeros = (
        Statistics.stack(tuple(Statistics.of(torch.rand(out, generator=generator) + 1, 3) for _ in range(groups)))
        for _ in range(2)
    )
    values, mask = (
        torch.randn(out, columns, generator=generator) * 50,
        torch.rand(out, columns, generator=generator) < share,
    )
    weight = BilevelWeight(codes, scales, zeros, Outliers(values, mask), order, bits=3, group_size=size, dtype=dtype)
    expected = torch.empty(out, columns)
    for place in range(columns):
        s, z = scales.values().view(groups, out)[place // size], zeros.values().view(groups, out)[place // size]
        expected[:, place if order is None else order[place]] = (codes[:, place] - z) * s
    return weight, torch.where(mask, values.half().float(), expected)


@pytest.mark.parametrize("size", [4, 8, 20, 64])
@pytest.mark.parametrize("ordered", [False, True])
def test_dense_is_the_definition(size, ordered, generator):
    """Oracle: (q - z) s, column by column, put at its place, then the outliers; 8 does not divide 20."""
    order = torch.randperm(20, generator=generator) if ordered else None
    weight, expected = packed(generator, size=size, order=order)
    assert_close(weight.dense(), expected)


def test_bytes_by_formula(generator):
    """Oracle: the paper's count at 3 bits, 3 + 6 / 16 + 64 / 256 a weight; outliers and order besides."""
    weight, _ = packed(generator, out=32, columns=64, size=16, share=0.0, order=torch.arange(64))
    rows, order = 4 * 33, 2 * 64
    assert 8 * (weight.nbytes - rows - order) == (3 + 6 / 16 + 64 / 256) * 32 * 64
    more, _ = packed(generator, out=32, columns=64, size=16, share=0.1, order=torch.arange(64))
    assert more.nbytes - weight.nbytes == 4 * len(more.outliers.value) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dense_has_the_dtype(dtype, generator):
    weight, expected = packed(generator, dtype=dtype)
    assert weight.dense().dtype == dtype
    assert_close(weight.dense(), expected.to(dtype))
