"""Random rotations: held by the dense Kronecker product, and by what orthogonal means."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.rotation import Rotation, haar, rotations


def dense(rotation, n):
    """The matrix itself, from its definition."""
    kron = torch.kron(rotation.left, rotation.right)
    return torch.eye(n)[rotation.last] @ kron @ torch.eye(n)[rotation.first]


@pytest.mark.parametrize(("n", "sizes"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (36, (6, 6)), (33, (3, 11))])
def test_is_the_kronecker_product_between_two_permutations(n, sizes, generator):
    """Oracle: `torch.kron` of the factors, as a dense matrix."""
    rotation = Rotation(n, generator, torch.device("cpu"))
    assert (len(rotation.left), len(rotation.right)) == sizes
    matrix, x = dense(rotation, n), torch.randn(2, 5, n, generator=generator)
    assert_close(rotation.apply(x), x @ matrix.T)
    assert_close(rotation.undo(x), x @ matrix)
    assert_close(matrix @ matrix.T, torch.eye(n))


def test_undo_undoes(generator):
    """Oracle: the identity; and it is not the identity by itself."""
    rotation, x = Rotation(24, generator, torch.device("cpu")), torch.randn(3, 24, generator=generator)
    assert_close(rotation.undo(rotation.apply(x)), x)
    assert not torch.allclose(rotation.apply(x), x, atol=0.1)


def test_a_spike_is_spread(generator):
    """Oracle: the definition of incoherence; a unit vector has mu = sqrt(n), a rotated one a few."""
    n = 256
    rotated = Rotation(n, generator, torch.device("cpu")).apply(torch.eye(n))
    assert rotated.abs().max() * n**0.5 < n**0.5 / 1.5
    assert rotated.abs().max(dim=1).values.mean() * n**0.5 < 6


def test_factors_are_uniform(generator):
    """Oracle: moments of the Haar measure: an entry has mean 0 and variance 1 / n, the trace mean 0 and variance 1."""
    many = torch.stack([haar(3, generator) for _ in range(2000)])
    assert_close(many @ many.mT, torch.eye(3, dtype=torch.float64).expand(2000, 3, 3))
    trace = many.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert many.mean(dim=0).abs().max() < 0.05  # four standard errors
    assert (many.square().mean(dim=0) - 1 / 3).abs().max() < 0.03
    assert abs(trace.mean()) < 0.1 and abs(trace.var() - 1) < 0.15


def test_a_seed_gives_them_back():
    """Oracle: another call; another seed gives others, and the global state is not touched."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (u, v), (again, _), (other, _) = (rotations(seed, (6, 9), torch.device("cpu")) for seed in (3, 3, 4))
    x = torch.eye(6)
    assert torch.equal(u.apply(x), again.apply(x))
    assert not torch.allclose(u.apply(x), other.apply(x))
    assert v.apply(torch.eye(9)).shape == (9, 9)
    assert torch.equal(torch.get_rng_state(), state)
