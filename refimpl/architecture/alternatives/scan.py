r"""The linear recurrence $h_t = a_t \odot h_{t-1} + b_t$ for all positions at once, by a parallel scan.

Source: the scan of `mamba` (arXiv 2312.00752), Section 3.3.2, over the pairs $(a, b)$ with the associative product
$(a, b) \bullet (a', b') = (aa',\; a'b + b')$; here by odd-even reduction (G. Blelloch, Prefix Sums and Their Applications,
CMU-CS-90-190, 1990): neighbours are joined, the half as long sequence is scanned, and the positions between are filled in.

Differs from the paper: plain PyTorch operations, not one fused kernel; the caller cuts long sequences into chunks, so that
what lives at once is bounded.

Not here: what $a$ and $b$ are made of.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_scan(decay: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    r"""States $h_t = a_t \odot h_{t-1} + b_t$ of all positions; differentiable once.

    Products of decays are formed, and no quotients or logarithms, so that nothing overflows and a decay of exactly 0 is
    right. About two multiplications an element more than one position after the other, in $2 \log_2(time)$ steps.

    Args:
        decay: `[batch, time, ...]`, $a$, of size at most 1; real or complex.
        inputs: the same shape and dtype, $b$.
        initial: `[batch, ...]`, $h$ before the first position.

    Returns:
        `[batch, time, ...]`.

    Raises:
        ValueError: shapes or dtypes do not fit, or there is no position.

    Examples:
        >>> decay, inputs = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 1.0, 7.0]])
        >>> linear_scan(decay, inputs, torch.tensor([4.0])).tolist()
        [[3.0, 2.5, 7.0]]
    """
    if inputs.ndim > 1 and inputs.shape[1] == 0:
        raise ValueError("inputs of time 0 have no state; pass at least one position")
    if decay.shape != inputs.shape or inputs.ndim < 2 or initial.shape != inputs[:, 0].shape:
        raise ValueError(
            f"decay {tuple(decay.shape)} and inputs {tuple(inputs.shape)} must be [batch, time, ...], "
            f"initial {tuple(initial.shape)} [batch, ...]"
        )
    if not decay.dtype == inputs.dtype == initial.dtype:
        raise ValueError(f"dtypes {decay.dtype}, {inputs.dtype} and {initial.dtype} must be one")
    states: Tensor = _Scan.apply(decay, inputs, initial)  # type: ignore[no-untyped-call]
    return states


class _Scan(torch.autograd.Function):
    """The scan, with the gradient of a linear recurrence: the same recurrence from the end to the start."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
        states = torch.empty_like(inputs)
        _scan(decay, inputs, torch.addcmul(inputs[:, 0], decay[:, 0], initial), states)
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, initial = ctx.saved_tensors
        conjugate = decay.conj().resolve_conj()
        backwards, late = gradient.flip(1), conjugate.flip(1).roll(1, dims=1)
        to_inputs = torch.empty_like(backwards)
        _scan(late, backwards, backwards[:, 0], to_inputs)
        to_inputs = to_inputs.flip(1)  # $g_t = \partial_t + \bar a_{t+1} g_{t+1}$
        to_decay = torch.empty_like(to_inputs)
        torch.mul(to_inputs[:, 1:], states[:, :-1].conj(), out=to_decay[:, 1:])
        to_decay[:, 0] = to_inputs[:, 0] * initial.conj()
        return to_decay, to_inputs, conjugate[:, 0] * to_inputs[:, 0]


def _scan(decay: Tensor, inputs: Tensor, first: Tensor, out: Tensor) -> None:
    """Write all states to `out`, given the first of them; what stands at position 0 of decay and inputs is not used."""
    time = inputs.shape[1]
    out[:, 0] = first
    if time == 1:
        return
    even, odd = slice(0, time // 2 * 2, 2), slice(1, None, 2)
    pair_decay = decay[:, odd] * decay[:, even]
    pair_inputs = torch.addcmul(inputs[:, odd], decay[:, odd], inputs[:, even])
    _scan(pair_decay, pair_inputs, torch.addcmul(inputs[:, 1], decay[:, 1], first), out[:, odd])
    if time > 2:
        before = out[:, 1 : time - 1 : 2]  # the states that the even positions from 2 on continue
        torch.addcmul(inputs[:, 2::2], decay[:, 2::2], before, out=out[:, 2::2])
