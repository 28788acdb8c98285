r"""WKV: a running average of values, in which each weighs $e^k$ and loses $e^{-w}$ with each position, for all positions at once.

Source: `rwkv` (arXiv 2305.13048), Eq. (16), and its recurrence with the largest exponent taken out, Appendix D, Eqs. (23) to
(28); official code BlinkDL/RWKV-LM@524481d5099b38d9bc8ef1e89209161b86c8011b, RWKV-v4neo/cuda/wkv_cuda.cu.

Differs from the paper: the recurrence runs over all positions at once by a parallel scan, where the official kernel goes
position by position with one thread for each channel. All exponents come from a running maximum of $k_i + i\,w$, and are
constants to the gradient: they scale numerator and denominator alike.

Not here: gradients of gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.architecture.alternatives.scan import linear_scan

CHUNK = 1024  # positions whose sums live at once
NOTHING = -1e38  # exponent of an empty sum


class WKVState(NamedTuple):
    r"""Sums over the past: numerator $a\,e^{o}$, denominator $b\,e^{o}$.

    Attributes:
        numerator: `[batch, channels]`, $a$.
        denominator: `[batch, channels]`, $b$, at least about 1 after the first position.
        exponent: `[batch, channels]`, $o$, the largest exponent so far; at first `NOTHING`.
    """

    numerator: Tensor
    denominator: Tensor
    exponent: Tensor


def no_past(like: Tensor) -> WKVState:
    """The state before the first position.

    Args:
        like: `[batch, channels]`, of the dtype and device that the state shall have.
    """
    zero = torch.zeros_like(like)
    return WKVState(zero, zero.clone(), zero + NOTHING)


def wkv(
    key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, state: WKVState, chunk: int = CHUNK
) -> tuple[Tensor, WKVState]:
    r"""Averages of all positions,
    $wkv_t = \frac{\sum_{i<t} e^{-(t-1-i)w + k_i} v_i + e^{u+k_t} v_t}{\sum_{i<t} e^{-(t-1-i)w + k_i} + e^{u+k_t}}$.

    Each exponential that is formed is at most about 1, so that no key and no length overflows. All arguments have one dtype,
    float32 at least.

    Args:
        key: `[batch, time, channels]`, $k$.
        value: `[batch, time, channels]`, $v$.
        decay: `[channels]`, $w > 0$.
        bonus: `[channels]`, $u$, added to the key of the present position.
        state: sums of the positions before.
        chunk: positions whose sums live at once; any gives the same result. Ours.

    Returns:
        `[batch, time, channels]`, each between the least and the largest value so far, and the state after.

    Raises:
        ValueError: chunk below 1.

    Examples:
        Keys of 0 and no decay: the plain average; with a bonus of ln 2 the present value counts twice.

        >>> key, value, none = torch.zeros(1, 3, 1), torch.tensor([[[3.0], [6.0], [0.0]]]), torch.zeros(1)
        >>> wkv(key, value, none, none, no_past(key[:, 0]))[0].flatten().tolist()
        [3.0, 4.5, 3.0]
        >>> [f"{y:.2f}" for y in wkv(key, value, none, none + 0.6931472, no_past(key[:, 0]))[0].flatten()]
        ['3.00', '5.00', '2.25']
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    outputs = []
    for k, v in zip(torch.split(key, chunk, dim=1), torch.split(value, chunk, dim=1), strict=True):
        y, state = _wkv_chunk(k, v, decay, bonus, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _wkv_chunk(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    """Averages of a chunk and the state after it; see `wkv`."""
    exponents = _exponents(key.detach(), decay.detach(), state.exponent.detach())
    before, after = exponents[:, :-1], exponents[:, 1:]
    weight = (key - after).exp()
    sums = linear_scan(
        (before - decay - after).exp().unsqueeze(2).expand(-1, -1, 2, -1),
        torch.stack((weight * value, weight), dim=2),
        torch.stack(state[:2], dim=1),
    )  # [b, t, 2, channels]
    past = torch.cat((torch.stack(state[:2], dim=1).unsqueeze(1), sums[:, :-1]), dim=1)
    y = _average(past[:, :, 0], past[:, :, 1], before, key + bonus, value)
    return y, WKVState(sums[:, -1, 0].clone(), sums[:, -1, 1].clone(), after[:, -1].clone())


def _exponents(key: Tensor, decay: Tensor, start: Tensor) -> Tensor:
    r"""$o_0, \dots, o_T$ with $o_t = \max(o_{t-1} - w, k_t) = \max(o_0, \max_{i \le t}(k_i + i\,w)) - t\,w$, `[batch, time + 1, channels]`."""
    age = torch.arange(1, key.shape[1] + 1, device=key.device, dtype=key.dtype)[:, None] * decay
    largest = torch.maximum((key + age).cummax(dim=1).values, start.unsqueeze(1))
    return torch.cat((start.unsqueeze(1), largest - age), dim=1)


def wkv_step(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, state: WKVState) -> tuple[Tensor, WKVState]:
    """One position, `[batch, channels]` each; as `wkv` otherwise.

    Examples:
        >>> one = torch.ones(1, 1)
        >>> y, state = wkv_step(0 * one, 5 * one, one[0], one[0], no_past(one))
        >>> y.item(), [x.item() for x in state]
        (5.0, [5.0, 1.0, 0.0])
    """
    y = _average(state.numerator, state.denominator, state.exponent, key + bonus, value)
    exponent = torch.maximum(state.exponent - decay, key).detach()
    kept, weight = (state.exponent - decay - exponent).exp(), (key - exponent).exp()
    return y, WKVState(kept * state.numerator + weight * value, kept * state.denominator + weight, exponent)


def _average(numerator: Tensor, denominator: Tensor, exponent: Tensor, present: Tensor, value: Tensor) -> Tensor:
    r"""The past's sums, of exponent $o$, joined with the present value, of exponent $u + k$."""
    largest = torch.maximum(exponent, present).detach()
    past, weight = (exponent - largest).exp(), (present - largest).exp()
    return (past * numerator + weight * value) / (past * denominator + weight)
