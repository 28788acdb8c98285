"""Truncated SVD: the theorem of Eckart and Young, and bytes that are never more than before."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.low_rank.factored import FactoredWeight, WholeWeight
from refimpl.compression.low_rank.svd import SVD, truncate
from refimpl.compression.protocol import CompressedLinear, compress


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_worked_by_hand():
    """Oracle: by hand. Of 4 (3, 4)/5 (1, 0) + 1 (-4, 3)/5 (0, 1), rank 1 keeps the first part."""
    weight = torch.tensor([[3.0, -1.0, 0.0, 0.0], [4.0, 0.75, 0.0, 0.0]])
    dense = SVD(rank=1)(weight).dense()
    assert_close(dense, torch.tensor([[3.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_error_is_the_singular_values_left_out(shape, rank, generator):
    """Oracle: Eckart and Young. The squared error is the sum of the rest of the eigenvalues of W Wᵀ, which no other matrix of
    that rank goes below."""
    weight = randn(*shape, generator=generator)
    error = (SVD(rank=rank)(weight).dense() - weight).square().sum()
    eigenvalues = torch.linalg.eigvalsh(weight @ weight.T).flip(0)
    assert_close(error, eigenvalues[rank:].sum())
    others = []
    for _ in range(20):  # the best for a random row space, by least squares
        rows = torch.linalg.qr(randn(shape[1], rank, generator=generator)).Q
        others.append((weight @ rows @ rows.T - weight).square().sum())
    assert min(others) > error


def test_no_step_from_the_optimum_helps(generator):
    """Oracle: calculus. The gradient of the error with respect to both factors is zero, and elsewhere it is not."""
    weight = randn(8, 11, generator=generator)
    left, right = (factor.requires_grad_() for factor in truncate(weight, 3))
    (left @ right - weight).square().sum().backward()
    assert_close(left.grad, torch.zeros_like(left))
    assert_close(right.grad, torch.zeros_like(right))
    right.grad = None
    (2 * left @ right - weight).square().sum().backward()
    assert right.grad.abs().max() > 0.1


def test_a_weight_of_low_rank_comes_back_whole(generator):
    """Oracle: its factors. One rank less, and it does not."""
    weight = randn(20, 3, generator=generator) @ randn(3, 30, generator=generator)
    assert_close(SVD(rank=3)(weight).dense(), weight)
    assert not torch.allclose(SVD(rank=2)(weight).dense(), weight)


def test_factors_share_the_singular_values_evenly(generator):
    """Oracle: the definition. Both have the first singular values as the squares of their own."""
    weight = randn(10, 14, generator=generator)
    packed = SVD(rank=4)(weight)
    values = torch.linalg.svdvals(weight)[:4].sqrt()
    assert_close(torch.linalg.svdvals(packed.left), values)
    assert_close(torch.linalg.svdvals(packed.right), values)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.9])
def test_ratio_is_the_share_of_parameters_removed(ratio, generator):
    """Oracle: arithmetic. One rank more would leave more than the share; bytes are the factors'."""
    weight = torch.randn(48, 80, generator=generator)
    packed = SVD(ratio=ratio)(weight)
    rank = packed.left.shape[1]
    assert rank * (48 + 80) <= (1 - ratio) * 48 * 80 < (rank + 1) * (48 + 80)
    assert packed.nbytes == 4 * rank * (48 + 80)


@pytest.mark.parametrize("method", [SVD(ratio=0.0), SVD(rank=5), SVD(rank=8), SVD(rank=1000)])
def test_factors_that_would_be_no_smaller_are_not_made(method, generator):
    """Oracle: the weight, bit by bit, at its own size. 5 (8 + 12) = 100 numbers are more than 8 × 12 = 96."""
    weight = torch.randn(8, 12, generator=generator)
    packed = method(weight)
    assert isinstance(packed, WholeWeight)
    assert torch.equal(packed.dense(), weight)
    assert packed.nbytes == weight.nbytes
    assert isinstance(SVD(rank=4)(weight), FactoredWeight)  # 80 numbers
    assert packed.whole.data_ptr() != weight.data_ptr()


def test_a_single_row_is_kept():
    """Oracle: arithmetic. One row of 33 has 33 numbers, its factors 34."""
    assert torch.equal(SVD(ratio=0.6)(torch.arange(33.0)[None]).dense(), torch.arange(33.0)[None])


def test_two_small_products_instead_of_the_weight(generator, monkeypatch):
    """Oracle: the product with `dense()`, which is not called. 2 rank (in + out) operations a row."""
    from torch.utils.flop_counter import FlopCounterMode

    weight, x = randn(40, 60, generator=generator), randn(2, 5, 60, generator=generator)
    layer = CompressedLinear(SVD(rank=6)(weight), torch.arange(40.0, dtype=torch.float64))
    expected = x @ layer.compressed.dense().T + torch.arange(40.0)
    monkeypatch.setattr(FactoredWeight, "dense", lambda self: 1 / 0)
    with FlopCounterMode(display=False) as counter:
        assert_close(layer(x), expected)
    assert counter.get_total_flops() == 2 * 10 * 6 * (40 + 60)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float64 result; half precision keeps factors to their own rounding."""
    weight = torch.randn(12, 20, generator=generator).to(dtype)
    packed = SVD(rank=3)(weight)
    assert packed.dense().dtype == packed.left.dtype == dtype
    assert packed.nbytes == 3 * 32 * weight.element_size()
    eps = torch.finfo(dtype).eps
    assert_close(
        packed.dense().double(), SVD(rank=3)(weight.double()).dense(), rtol=0, atol=max(1e-12, 20 * eps)
    )  # 3 products


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 must be 0 \(nothing is removed\) to below 1"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"rank": 0}, "rank=0 must be at least 1, or None"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SVD(**change)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        SVD()(torch.full((2, 3), float("nan")))


def test_nothing_removed_is_the_identity(generator):
    """Oracle: the model. Also as an initialization that is exact from the rank on that factors can't improve."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 4))
    x = torch.randn(3, 9, generator=generator)
    assert_close(compress(model, SVD(ratio=0.0))(x), model(x))
    assert not torch.allclose(compress(model, SVD(ratio=0.6))(x), model(x))


def output_error(weight, dense, inputs):
    return float((inputs @ (dense - weight).T).norm() / (inputs @ weight.T).norm())


def test_claim_smallest_weight_error(claim, generator):
    """Squared error over the squared singular values left out, on a layer of 256 × 512 at ratio 0.4."""
    weight, _ = substrate(generator)
    packed = SVD(ratio=0.4)(weight.double())
    left_out = torch.linalg.svdvals(weight.double())[packed.left.shape[1] :].square().sum()
    claim("svd", "smallest-weight-error", float((packed.dense() - weight).square().sum() / left_out))


def test_claim_blind_to_inputs(claim, generator):
    """Output error over the least that the same rank allows, known from the inputs: SVD of W XᵀX's root, ratio 0.2."""
    weight, inputs = (tensor.double() for tensor in substrate(generator))
    packed = SVD(ratio=0.2)(weight)
    left, right = truncate(weight @ inputs.T, packed.left.shape[1])
    least = float((left @ right - weight @ inputs.T).norm() / (weight @ inputs.T).norm())
    claim("svd", "blind-to-inputs", output_error(weight, packed.dense(), inputs) / least)


def test_claim_not_the_smallest_values_first(claim, generator):
    """Share of single ranks whose removal moves the output less than removing a smaller singular value's does."""
    weight, inputs = (tensor.double() for tensor in substrate(generator))
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)
    loss = s * (inputs @ vh.T).norm(dim=0)  # leaving out rank i alone moves the output by this much
    i, j = torch.triu_indices(len(s), len(s), 1)
    claim("svd", "not-the-smallest-first", float((loss[i] < loss[j]).double().mean()))
