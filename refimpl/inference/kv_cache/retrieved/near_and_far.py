r"""Attention to keys at their own distances and to others at one, under one softmax.

Source: `infllm` (arXiv 2402.04617), Section 3.1, and Section 3.2, Positional Encoding; official code
thunlp/InfLLM@12b70798f56e56ebb23c53c7018091a3f540a028, inf_llm/attention/dot_production_attention/torch_impl.py.

Differs from the paper: none. Not here: a fused kernel, which the code has, too.
"""

import torch
from torch import Tensor


def near_and_far(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """What queries find, and the attention that each near key gets. Each argument is a pair: for near keys, and for far ones.

    Args:
        queries: `[rows, heads, time, head_dim]`, rotated to where they stand, and to the one distance.
        keys: `[rows, kv_heads, near or far, head_dim]`, rotated to where they stand, and not.
        values: the same shapes.
        seen: which keys a query sees, to be broadcast to `[rows, kv_heads, group, time, near or far]`; one at least.

    Returns:
        `[rows, heads, time, head_dim]`, and the weights' sums over the queries, `[rows, heads, near]`.

    Examples:
        >>> q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)  # attention is even
        >>> see = torch.tensor([True, True, False])
        >>> found, received = near_and_far((q, q), (k, k), (k + 1, k + 5), (see, see))
        >>> found.tolist(), received.tolist()
        ([[[[3.0, 3.0]]]], [[[0.25, 0.25, 0.0]]])
    """
    time, width = queries[0].shape[2:]
    scores = [_products(q, k).masked_fill(~see, float("-inf")) for q, k, see in zip(queries, keys, seen, strict=True)]
    weights = (torch.cat(scores, dim=-1) / width**0.5).softmax(dim=-1)  # [rows, kv_heads, group, time, near + far]
    near, far = weights.flatten(2, 3).split([k.shape[2] for k in keys], dim=3)
    found = torch.unflatten(near @ values[0] + far @ values[1], 2, (-1, time)).flatten(1, 2)
    return found, torch.unflatten(near, 2, (-1, time)).sum(dim=3).flatten(1, 2)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Of each query head with its keys, `[rows, kv_heads, group, time, tokens]`."""
    grouped = torch.unflatten(q, 1, (k.shape[1], -1))
    return torch.unflatten(grouped.flatten(2, 3) @ k.mT, 2, grouped.shape[2:4])
