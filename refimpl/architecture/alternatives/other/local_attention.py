r"""Causal attention over the positions just before, of any length, with one head of keys and values for all queries.

Source: `griffin` (arXiv 2402.19427), Section 2.3; official code
google-deepmind/recurrentgemma@2efa84dac0e68e63547a27a18fa943c98f1c312e, recurrentgemma/torch/modules.py
(`LocalAttentionBlock`, `_apply_rope`, `_compute_causal_mask`).

Differs from the paper: a query sees its own position and `window` more, and rotary positions turn half of a head, both as in
the official code; the paper says neither. Queries are taken in blocks, so that scores of a whole text never stand at once;
the official code forms them all. Keys and values lie in the order of their positions, where it writes round and round.

Not here: several texts in a row of tokens, more heads of keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries at once, at least


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    r"""Each query over the key of its own position and the `window` keys before.

    Args:
        q: `[batch, heads, time, head_dim]`.
        k: `[batch, past + time, head_dim]`; query i stands at key past + i.
        v: the same shape.
        window: keys before its own that a query sees, at least 1.

    Returns:
        `[batch, heads, time, head_dim]`.

    Examples:
        Equal keys, so that values are averaged: over two, as the window is one.

        >>> q, k, v = torch.ones(1, 1, 3, 1), torch.ones(1, 3, 1), torch.tensor([[[2.0], [4.0], [8.0]]])
        >>> local_attention(q, k, v, window=1).flatten().tolist()
        [2.0, 3.0, 6.0]
    """
    time, past = q.shape[2], k.shape[1] - q.shape[2]
    block = time if k.shape[1] <= window + 1 else max(window, BLOCK)
    outputs = [_attend(q[:, :, start : start + block], k, v, past + start, window) for start in range(0, time, block)]
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, place: int, window: int) -> Tensor:
    """Outputs of a block of queries, the first of which stands at key `place`."""
    n, first = q.shape[2], max(0, place - window)
    keys, values = (x[:, None, first : place + n].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if n == 1:  # it sees them all
        return F.scaled_dot_product_attention(q, keys, values)
    if not place and n <= window + 1:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=_band(n, keys.shape[2], window, q.device))


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """True where a query sees a key, `[queries, keys]`; the last query stands at the last key."""
    own = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(own).triu(own - window)


def rotate_first_half(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    r"""Rotary positions on the first half of each head's dimensions, where i is paired with i + head_dim / 4.

    Args:
        x: `[..., time, head_dim]`, head_dim divisible by 4.
        positions: `[time]`.
        theta: base of the wavelengths.

    Returns:
        x's shape and dtype; the second half is as it was.

    Examples:
        >>> turned = rotate_first_half(torch.tensor([[1.0, 0.0, 3.0, 4.0]]), torch.tensor([1]))
        >>> [round(y, 3) for y in turned.flatten().tolist()]  # cosine and sine of one radian
        [0.54, 0.841, 3.0, 4.0]
    """
    quarter = x.shape[-1] // 4
    frequencies = theta ** -(torch.arange(quarter, device=x.device) / quarter)
    angles = positions.unsqueeze(-1) * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two, rest = torch.split(x, [quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin, rest), dim=-1)
