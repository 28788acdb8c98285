"""Hadamard rotations: defining property, a peer's, sizes that have none."""

import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.hadamard import _field_of, is_hadamard, turn, turn_across

PALEY = (12, 20, 28, 36, 44, 52, 60, 108, 140)


def matrix(n):
    return turn(torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, *PALEY, 24, 40, 48, 104, 344])
def test_entries_are_alike_and_rows_orthogonal(n):
    """Oracle: the definition of a Hadamard matrix, $H H^T = n I$ with entries 1 and -1; 344 is over a field of 7^3 elements."""
    h = matrix(n) * math.sqrt(n)
    assert_close(h.abs(), torch.ones_like(h))
    assert_close(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    assert is_hadamard(n)


def test_worked_by_hand():
    """Oracle: Sylvester's matrix of order 4, written out."""
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * matrix(4)).round().tolist() == expected


@pytest.mark.parametrize("n", [3, 6, 7, 33, 44 * 7])
def test_other_sizes_are_orthogonal_too(n):
    """Oracle: the definition. There is no Hadamard matrix of order 3, 6, 7 or 33."""
    h = matrix(n)
    assert_close(h @ h.T, torch.eye(n, dtype=torch.float64))
    assert h.abs().max() < 1 and is_hadamard(n) == (n == 308)


@pytest.mark.parametrize("n", [8, 40, 6, 5])
def test_turning_back_is_the_inverse(n, generator):
    """Oracle: the identity, and the matrix itself; control: turning twice is not."""
    x = torch.randn(2, 3, n, generator=generator).double()
    assert_close(turn(turn(x), back=True), x)
    assert_close(turn(x), x @ matrix(n))
    assert_close(turn(x, back=True), x @ matrix(n).T)
    if n in (40, 5):  # not symmetric
        assert not torch.allclose(turn(turn(x)), x)


@pytest.mark.parametrize("n", [8, 64])
def test_equals_torchaos(n, generator):
    """Oracle: torchao's SpinQuant primitives (0.18), for powers of two, where there is one customary matrix."""
    from torchao.prototype.spinquant.hadamard_utils import hadamard_matrix

    x = torch.randn(5, n, generator=generator)
    assert_close(turn(x), x @ hadamard_matrix(n, torch.device("cpu")).float())


def test_across_heads_by_hand(generator):
    """Oracle: Kronecker products. Three of heads and one of channels are turned, one as itself."""
    x, eye = torch.randn(4, 24, generator=generator).double(), torch.eye(3, dtype=torch.float64)
    assert_close(turn_across(x, 8), x @ torch.kron(matrix(8), eye))
    assert_close(turn_across(x, 24), turn(x))
    assert torch.equal(turn_across(x, 1), x)
    assert_close(turn_across(turn_across(x, 8), 8, back=True), x)


def test_which_fields():
    """Oracle: by hand. 12 = 11 + 1, 28 = 27 + 1 with 27 = 3^3, 36 = 2 (17 + 1), 344 = 7^3 + 1; 92 = 2 * 45 + 2 and 91 are none."""
    assert [_field_of(n) for n in (12, 28, 36, 344, 92, 6)] == [(11, 1), (3, 3), (17, 1), (7, 3), None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_follows_the_dtype(dtype, generator):
    """Oracle: the float32 result, cast."""
    x = torch.randn(3, 12, generator=generator).to(dtype)
    assert turn(x).dtype == dtype
    assert_close(turn(x).float(), turn(x.float()).to(dtype).float())


def test_one_outlier_becomes_none():
    """Oracle: closed form. A vector along one axis becomes one whose entries are all $1 / \\sqrt{n}$."""
    assert_close(turn(torch.eye(40)[7]).abs(), torch.full((40,), 40**-0.5))
