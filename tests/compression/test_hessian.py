"""Shared second-order steps: held by LAPACK, by hand, and by least squares."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.hessian import Sweep, gram, inverse_factor, layer_hessian


def layer(generator, out=5, columns=12, rows=40, dtype=torch.float32):
    """A weight and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    weight, inputs = (
        torch.randn(out, columns, generator=generator),
        torch.randn(rows, columns, generator=generator) @ mixing,
    )
    return weight.to(dtype), inputs.to(dtype)


def test_factor_is_that_of_the_inverse(generator):
    """Oracle: LAPACK by the paper's route in float64, Cholesky of H, its inverse, upper Cholesky of that."""
    _, inputs = layer(generator)
    hessian = gram(inputs.double())
    none = torch.zeros(12, dtype=torch.bool)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12)
    expected = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    assert_close(inverse_factor(hessian, none, 0.05), expected, rtol=1e-4, atol=1e-5)  # the Hessian is float32
    order = torch.randperm(12, generator=generator)
    permuted = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    assert_close(inverse_factor(hessian, none, 0.05, order), permuted, rtol=1e-4, atol=1e-5)  # as above


def test_damping_is_a_share_of_the_live_diagonal():
    """Oracle: by hand. The mean of 4 and 16 is 10; 1 / sqrt(4 + 10 / 2) and 1 / sqrt(16 + 10 / 2)."""
    factor = inverse_factor(torch.diag(torch.tensor([4.0, 0.0, 16.0])), torch.tensor([False, True, False]), damping=0.5)
    assert_close(factor.diagonal()[[0, 2]], torch.tensor([1 / 3, 21**-0.5]))


def test_gram_by_hand():
    """Oracle: by hand, in the dtype that is asked for."""
    inputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.bfloat16)
    assert gram(inputs).tolist() == [[10.0, 2.0], [2.0, 4.0]]
    assert (gram(inputs).dtype, gram(inputs, torch.float64).dtype) == (torch.float32, torch.float64)


def test_dead_columns_are_those_without_input(generator):
    weight, inputs = layer(generator)
    inputs[:, [2, 7]] = 0
    hessian, dead = layer_hessian("X", weight, inputs)
    assert dead.nonzero().flatten().tolist() == [2, 7]
    assert_close(hessian, inputs.T @ inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "X needs the layer's inputs: pass `inputs`, or `calibration` to `compress`"),
        (torch.ones(5, 4), r"inputs of shape \(5, 4\) must be \[n, in\]"),
        (torch.zeros(5, 3), "inputs are all zero"),
        (torch.full((5, 3), 1e-30), "inputs are all zero"),  # so are their squares, in float32
        (torch.full((5, 3), float("nan")), "inputs hold NaN"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        layer_hessian("X", torch.ones(2, 3), inputs)


def settled(weight, inputs, rounded, *, stop=None, block=128, damping=1e-9):
    """The weight after a sweep."""
    hessian, dead = layer_hessian("X", weight, inputs, weight.dtype)
    columns = weight.T.clone()
    seen = []
    for i, sweep in enumerate(Sweep(columns, inverse_factor(hessian, dead, damping), block, stop)):
        seen.append(sweep.current(slice(i, i + 3)))
        assert_close(seen[-1][0], sweep.column)
        sweep.settle(rounded(sweep.column))
    return columns.T, seen


@pytest.mark.parametrize("block", [1, 4, 5, 128])
def test_what_is_left_free_is_what_least_squares_would_have_there(block, generator):
    """Oracle: LAPACK's least squares. Given the seven columns rounded, no choice of the other five gives a smaller error."""
    weight, inputs = layer(generator, dtype=torch.float64)
    result, _ = settled(weight, inputs, torch.round, stop=7, block=block)
    assert (result[:, :7] == result[:, :7].round()).all()
    assert not torch.equal(result[:, :7], weight[:, :7].round())  # negative control: corrections reached them
    target = inputs @ (weight - torch.nn.functional.pad(result[:, :7], (0, 5))).T
    best = torch.linalg.lstsq(inputs[:, 7:], target).solution.T
    assert_close(result[:, 7:], best, rtol=1e-6, atol=1e-7)  # the damping is 1e-9


def test_a_group_is_seen_as_it_will_stand_if_nothing_more_is_rounded(generator):
    """Oracle: a sweep that stops there leaves it so."""
    weight, inputs = layer(generator, dtype=torch.float64)
    _, seen = settled(weight, inputs, torch.round, block=4)
    for i in (1, 3, 4, 6, 9):
        result, _ = settled(weight, inputs, torch.round, stop=i)
        assert_close(seen[i], result[:, i : i + 3].T)


def test_settling_to_itself_changes_nothing(generator):
    """Oracle: no error, no correction."""
    weight, inputs = layer(generator)
    assert torch.equal(settled(weight, inputs, lambda w: w, damping=0.01)[0], weight)


def test_a_singular_hessian_is_refused():
    with pytest.raises(ValueError, match="damping=0 leaves the Hessian of these inputs singular: raise it"):
        inverse_factor(torch.ones(3, 3), torch.tensor([False] * 3), damping=0)
