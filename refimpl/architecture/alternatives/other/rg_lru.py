r"""RG-LRU: a diagonal linear recurrence whose decay and input are gated, and which keeps the size of what it sums.

Source: `griffin` (arXiv 2402.19427), Section 2.4, Eqs. (1) to (4), and Appendix A, Eqs. (5) and (6); official code
google-deepmind/recurrentgemma@2efa84dac0e68e63547a27a18fa943c98f1c312e, recurrentgemma/torch/layers.py (`RGLRU`, `rnn_scan`).

Differs from the paper: at the first position of a text the input is not scaled by $\sqrt{1 - a_t^2}$ and nothing before it
counts, and the slope of the root is at most 1,000 for the gradient: both as in the official code. All of it is float32 at
least; there only the sum is, and decay and root have the inputs' dtype.

Not here: the complex form of Appendix B, gradients of gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from refimpl.architecture.alternatives.scan import linear_scan

C = 8.0  # how far the gate moves the decay: from $a^c$ to 1
STEEPEST = 1000.0  # slope of the root


def rg_lru(
    x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, decay: Tensor, initial: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""States $h_t = a_t \odot h_{t-1} + \sqrt{1 - a_t^2} \odot (i_t \odot x_t)$ of all positions (Eq. 4).

    Args:
        x: `[batch, time, channels]`.
        recurrence_gate: of x's shape, $r_t$ in (0, 1).
        input_gate: of x's shape, $i_t$ in (0, 1).
        decay: `[channels]`, $-\Lambda$; $a = \sigma(\Lambda)$.
        initial: `[batch, channels]`, $h$ before, float32 at least.
        reset: `[batch or 1, time]`, true where a text begins: nothing before it counts and $h_t = i_t \odot x_t$; None is
            nowhere.

    Returns:
        `[batch, time, channels]` and the last state, both in initial's dtype.

    Examples:
        With $a = 1/2$ and $r = 1/8$ a decay of one half: 8 at the first position, then half of it and 2 times the root of 3/4.

        >>> x, one = torch.tensor([[[8.0], [2.0]]]), torch.ones(1, 2, 1)
        >>> h, last = rg_lru(x, one / 8, one, torch.zeros(1), torch.zeros(1, 1), torch.tensor([[True, False]]))
        >>> [round(y, 4) for y in h.flatten().tolist()], round(4 + 3**0.5, 4)
        ([8.0, 5.7321], 5.7321)
    """
    a, b = decay_and_input(x, recurrence_gate, input_gate, decay, reset, initial.dtype)
    states = linear_scan(a, b, initial)
    return states, states[:, -1].clone()


def decay_and_input(
    x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, decay: Tensor, reset: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""$a_t$, from $\ln a_t = -c\, r_t \operatorname{softplus}(-\Lambda)$ (Eq. 6), and $\sqrt{1 - a_t^2} \odot (i_t \odot x_t)$.

    Args:
        x: `[..., channels]`, as both gates.
        recurrence_gate: $r_t$.
        input_gate: $i_t$.
        decay: `[channels]`, $-\Lambda$.
        reset: `[...]`, true where the decay is 0 and the root 1; None is nowhere.
        dtype: in which all of it is computed.
    """
    log_a = -C * recurrence_gate.to(dtype) * F.softplus(decay.to(dtype))
    root = _Root.apply(-torch.expm1(2 * log_a))  # type: ignore[no-untyped-call]
    a, inputs = log_a.exp(), (input_gate * x).to(dtype)
    if reset is None:
        return a, root * inputs
    begins = reset.unsqueeze(-1)
    return torch.where(begins, 0.0, a), torch.where(begins, inputs, root * inputs)


class _Root(torch.autograd.Function):
    """The square root, its slope cut at `STEEPEST`: it has none at 0, where a gate keeps all of a state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root: Tensor = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        slope: Tensor = gradient / (2 * root).clamp(min=1 / STEEPEST)
        return slope
