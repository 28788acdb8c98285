"""The form in which low-rank methods store a weight."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.low_rank.factored import FactoredWeight, WholeWeight, rank_for


def test_product_is_that_of_the_factors(generator):
    """Oracle: matrix products in float64, and bytes by hand."""
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (2, 7)))
    x, bias = torch.randn(3, 7, generator=generator, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    factored = FactoredWeight(left, right)
    assert_close(factored.dense(), left @ right)
    assert_close(factored.multiply(x, bias), x @ (left @ right).T + 1)
    assert factored.nbytes == 8 * 2 * (5 + 7)


def test_slices_are_stored_alone(generator):
    """Oracle: the storage. A slice of a larger factor does not hold the rest of it."""
    factored = FactoredWeight(torch.randn(5, 9, generator=generator)[:, :2], torch.randn(9, 7, generator=generator)[:2])
    whole = WholeWeight(torch.randn(9, 5, generator=generator).T)
    for buffer in [*factored.buffers(), *whole.buffers()]:
        assert buffer.untyped_storage().nbytes() == buffer.nbytes
        assert buffer.is_contiguous()


@pytest.mark.parametrize(("ratio", "rank"), [(0.0, 4), (0.2, 3), (0.9, 1), (0.999, 1)])
def test_rank_by_hand(ratio, rank):
    """Oracle: by hand. 6 × 20 / 26 = 4.6; the rank never rounds to nothing."""
    assert rank_for(6, 20, ratio) == rank


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_ratio_is_checked(ratio):
    with pytest.raises(ValueError, match="ratio="):
        rank_for(6, 20, ratio)
