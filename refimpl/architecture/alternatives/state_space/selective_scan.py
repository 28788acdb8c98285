r"""The selective scan: a state-space system whose step and maps change at every position, for all positions at once.

Source: `mamba` (arXiv 2312.00752), Eq. (2a), (2b) and Section 3.3.2; official code
state-spaces/mamba@52f57d66f8d6d02a73b1e38f5f3708eb8ccfa39c, mamba_ssm/ops/selective_scan_interface.py.

Differs from the paper: chunk by chunk in plain PyTorch, where the paper has one fused kernel; as there, states are not kept
for the gradient but computed again.

Not here: complex $A$, gradients of gradients.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refimpl.architecture.alternatives.scan import linear_scan

CHUNK = 64  # positions whose states live at once


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    r"""The system $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t$, $y_t = C_t^\top h_t$ of each channel (Eq. 2).

    Products of $e^{\Delta A} \le 1$ are all that is formed, so that no step or length overflows. The states of one chunk live at
    a time; for the gradient, those at the chunks' ends are kept and the others computed again (Section 3.3.2).

    Args:
        u: `[batch, time, channels]`.
        delta: `[batch, time, channels]`, $\Delta > 0$.
        A: `[channels, d_state]`, negative.
        B: `[batch, time, d_state]`.
        C: `[batch, time, d_state]`.
        initial: `[batch, channels, d_state]`, $h$ before.
        chunk: positions whose states live at once; any gives the same result. Ours.

    Returns:
        y `[batch, time, channels]` and the last state, both in delta's dtype.

    Raises:
        ValueError: chunk below 1.

    Examples:
        One channel, one number of state: a decay of one half at each step, and $\Delta B u = \ln 2$ comes in.

        >>> one, step = torch.ones(1, 2, 1), torch.full((1, 2, 1), 0.6931472)
        >>> y, _ = selective_scan(one, step, torch.tensor([[-1.0]]), one, one, torch.zeros(1, 1, 1))
        >>> (y / 0.6931472).flatten().tolist()
        [1.0, 1.5]
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    outputs, state = [], initial
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (u, delta, A, B, C, initial))
    for part in zip(*(torch.split(x, chunk, dim=1) for x in (u, delta, B, C)), strict=True):
        if kept:
            y, state = checkpoint(_scan_chunk, A, state, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(A, state, *part)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _scan_chunk(A: Tensor, state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk and the state after it; see `selective_scan`."""
    decay = (delta.unsqueeze(-1) * A).exp()  # [b, t, channels, d_state]
    states = linear_scan(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(-2), state)
    return (states @ C.unsqueeze(-1)).squeeze(-1), states[:, -1].clone()
