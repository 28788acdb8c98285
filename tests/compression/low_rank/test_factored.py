"""The form in which low-rank methods store a weight."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.low_rank.factored import (
    FactoredPlusRows,
    FactoredWeight,
    WholeWeight,
    check_size,
    output_directions,
    project,
    rank_for,
)


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


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_projection_is_the_weighted_svd_with_the_weight_undone(shape, generator):
    """Oracle: the definition, truncated SVD of WS times the inverse of S, in float64; plain SVD is something else."""
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    s = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(weight @ s, full_matrices=False)
    expected = (u[:, :3] * values[:3]) @ vh[:3] @ torch.linalg.inv(s)
    packed = project(weight, output_directions(weight @ s)[0], 3)
    assert_close(packed.dense(), expected)
    assert not torch.allclose(project(weight, output_directions(weight)[0], 3).dense(), expected)
    assert_close(packed.left.norm(dim=0), packed.right.norm(dim=1))  # balanced


def test_directions_that_a_weight_does_not_reach_are_zero():
    """Oracle: by hand. Rank 2 of a weight of rank 1 is that weight, without 0/0."""
    weight = torch.zeros(6, 8)
    weight[0] = 3.0
    packed = project(weight, torch.eye(6), 2)
    assert torch.equal(packed.dense(), weight)
    assert packed.nbytes == 4 * 2 * (6 + 8)


def test_a_projection_that_would_be_no_smaller_is_not_made(generator):
    """Oracle: arithmetic. 4 (8 + 8) numbers are as many as 8 × 8."""
    weight = torch.randn(8, 8, generator=generator)
    assert isinstance(project(weight, torch.eye(8), 4), WholeWeight)
    assert isinstance(project(weight, torch.eye(8), 3), FactoredWeight)


@pytest.mark.parametrize(
    ("ratio", "rank", "message"), [(1.0, None, "ratio=1.0"), (0.2, 0, "rank=0 must be at least 1")]
)
def test_sizes_are_checked(ratio, rank, message):
    with pytest.raises(ValueError, match=message):
        check_size(ratio, rank)


def test_stored_rows_are_added(generator):
    """Oracle: dense matrices, and bytes by hand."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    left, right, rows, index = draw(6, 2), draw(2, 9), draw(2, 9), torch.tensor([1, 4])
    packed = FactoredPlusRows(left, right, rows, index)
    expected = left @ right
    expected[index] += rows
    assert_close(packed.dense(), expected)
    x, bias = draw(3, 5, 9), draw(6)
    assert_close(packed.multiply(x, bias), x @ expected.T + bias)
    assert packed.nbytes == 8 * (2 * (6 + 9) + 2 * 9) + 4 * 2
