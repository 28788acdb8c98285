"""The estimator: its value and its gradient."""

import pytest
import torch

from refimpl.compression.quantization.qat.straight_through import straight_through


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_is_the_rounded_one_and_gradient_that_of_the_identity(dtype, generator):
    """Oracle: by definition, to the last bit."""
    x = torch.randn(400, generator=generator).to(dtype).requires_grad_()
    rounded = (x.detach() / 0.3).round() * 0.3
    y = straight_through(x, rounded)
    assert torch.equal(y, rounded) and y.dtype == dtype
    weights = torch.randn(400, generator=generator).to(dtype)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_no_gradient_outside_and_none_to_the_rounded_value():
    """Oracle: by hand."""
    x = torch.tensor([-2.0, 0.4, 5.0], requires_grad=True)
    rounded = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    (straight_through(x, rounded, (x >= -1) & (x <= 3)) * torch.tensor([7.0, 8.0, 9.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 8.0, 0.0] and rounded.grad is None
    assert not straight_through(x.detach(), rounded).requires_grad


def test_what_is_clipped_far_is_exact_too():
    """Oracle: the value given; as the sum x + (r - x) it would be lost in x's last digits."""
    x, rounded = torch.tensor([1e8]), torch.tensor([0.1])
    assert torch.equal(straight_through(x, rounded), rounded)
    assert not torch.equal(x + (rounded - x), rounded)  # negative control
