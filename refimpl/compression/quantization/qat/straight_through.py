r"""The straight-through estimator: a rounded value in the forward pass, the gradient of the value itself in the backward pass.

Source: `ste-2013` (arXiv 1308.3432), Section 3.1, "straight-through estimator", for a threshold; with rounding in the place of the
threshold it is that of `integer-arithmetic-inference-2018` (arXiv 1712.05877), Section 3.

Differs from the paper: none.

Not here: estimators with a slope of their own, stochastic rounding; second derivatives.
"""

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    r"""The value of `rounded` with the gradient of x: $\partial y / \partial x = 1$ inside, 0 outside.

    Exactly the value: as $x + (r - x)$ with the difference detached, as it is often written, it may be lost in x's last digits.

    Args:
        x: any shape.
        rounded: the same shape; no gradient reaches it. It is cast to x's dtype.
        inside: the same shape, True where the gradient passes; None passes it everywhere.

    Returns:
        `rounded`, in x's dtype.

    Examples:
        >>> x = torch.tensor([0.4, 9.0], requires_grad=True)
        >>> y = straight_through(x, x.detach().round().clamp(max=3), x <= 3)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 3.0], [1.0, 0.0])
    """
    y: Tensor = _StraightThrough.apply(x, rounded.detach().to(x.dtype), inside)  # type: ignore[no-untyped-call]
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:  # noqa: ARG004 - x gives the shape of its gradient
        ctx.masked = inside is not None
        if inside is not None:
            ctx.save_for_backward(inside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.masked:
            return gradients[0], None, None
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None
