r"""The attention that queries pay to keys, by which methods judge what to drop.

Attention functions do not hand out their weights, so a cache that needs them computes them from the queries that it is given: in
float32 or above, with the scale, the causal order and the sliding window of `refimpl.model`, and in blocks of queries, so that a
long prompt does not need its whole matrix at once. Query head h reads key head h // group; what a key head makes of the weights
of its group is the method's business.

Not here: `Decoder.score_bias` and attention functions that replace the model's own, of which a cache does not know.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

AT_ONCE = 2**22  # weights in a block


def attention_blocks(
    queries: Tensor, keys: Tensor, positions: Tensor, start: int, window: int | None = None
) -> Iterator[Tensor]:
    r"""Attention weights $\operatorname{softmax}(q K^\top / \sqrt d)$, some queries after another.

    Args:
        queries: `[rows, heads, time, head_dim]`, rotated.
        keys: `[rows, kv_heads, tokens, head_dim]`, rotated, in any order.
        positions: `[rows, 1 or kv_heads, tokens]` of the keys; every query must see a key.
        start: position of the first query.
        window: a query sees keys less than so many positions before it; None sees all.

    Yields:
        `[rows, kv_heads, group, part of time, tokens]`, float32 or wider; 0 where a query does not see a key.

    Examples:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> next(attention_blocks(q, k, torch.arange(2).view(1, 1, 2), 0)).tolist()  # the first does not see the second
        [[[[[1.0, 0.0], [0.5, 0.5]]]]]
    """
    rows, kv_heads, tokens, width = keys.shape
    wide = torch.promote_types(keys.dtype, torch.float32)
    columns = keys.to(wide).mT
    heads, time = queries.shape[1:3]
    size = max(1, AT_ONCE // (rows * heads * tokens))
    for first in range(0, time, size):
        part = queries[:, :, first : first + size].to(wide) / math.sqrt(width)
        grouped = torch.unflatten(part, 1, (kv_heads, -1))  # [r, h, g, t, d]
        scores = torch.unflatten(grouped.flatten(2, 3) @ columns, 2, grouped.shape[2:4])
        if time > 1 or window is not None:  # one query is behind all keys
            seen = visible(positions, start + first, part.shape[2], window)
            scores.masked_fill_(~seen.unsqueeze(2), float("-inf"))
        yield scores.softmax(dim=-1)


def visible(positions: Tensor, start: int, time: int, window: int | None = None) -> Tensor:
    """Which keys queries see.

    Args:
        positions: `[rows, 1 or kv_heads, tokens]` of the keys.
        start: position of the first query.
        time: number of queries.
        window: as in `attention_blocks`.

    Returns:
        `[rows, 1 or kv_heads, time, tokens]`, bool.

    Examples:
        >>> visible(torch.tensor([[[0, 1, 5]]]), 5, 2, window=5).tolist()
        [[[[False, True, True], [False, False, True]]]]
    """
    behind = torch.arange(start, start + time, device=positions.device).unsqueeze(1) - positions.unsqueeze(2)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)
