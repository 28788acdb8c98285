r"""Which of five policies each head of a prompt gets: the one that keeps least and still recovers enough of its attention.

The ladder, each policy a union with those before it: special tokens; punctuation; the most attended tokens; a local window; all.

Source: `fastgen` (arXiv 2310.01801), Sections 3.3 and 3.4, Eq. (1) and (2). Half of the summed difference between a query's
attention and that over what is kept is the share of its weight that falls on what is dropped, whatever they are. So a policy
recovers the mean, over the prompt's queries, of the weight on what it keeps.

Differs from the paper: it leaves open the norm of Eq. (1), here as in the reproduction, and whether a query's own token counts. Here it is always seen, as it is when it is computed in
decoding. It has a key head for each query head; where several share one, a policy must recover enough for each of them.

Not here: other policies, which the paper allows for.
"""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL = range(5)


def recovered(
    queries: Tensor,
    keys: Tensor,
    special: Tensor,
    punctuation: Tensor,
    frequent: int,
    local: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of its attention that each policy leaves each query head, over a whole prompt.

    Args:
        queries: `[rows, heads, n, head_dim]`, rotated.
        keys: `[rows, kv_heads, n, head_dim]`, rotated.
        special: `[rows, n]`, bool.
        punctuation: `[rows, n]`, bool.
        frequent: tokens that each key head keeps for having received most, of all its query heads together.
        local: tokens before its own that a query sees for being close.
        window: of a sliding-window layer.

    Returns:
        `[rows, kv_heads, group, 4]`, of all policies but the last, which leaves all; and what each key has received,
        `[rows, kv_heads, n]`; float32 or wider.

    Examples:
        >>> q = k = torch.zeros(1, 1, 2, 4)  # attention is even: the second query has half on the first token
        >>> first, none = torch.tensor([[True, False]]), torch.tensor([[False, False]])
        >>> recovered(q, k, first, none, 0, 0)[0].tolist(), recovered(q, k, none, none, 0, 1)[0].tolist()
        ([[[[1.0, 1.0, 1.0, 1.0]]]], [[[[0.75, 0.75, 0.75, 1.0]]]])
    """
    rows, kv_heads, n, _ = keys.shape
    places = torch.arange(n, device=keys.device)
    shape = rows, kv_heads, queries.shape[1] // kv_heads, n
    received, own, close = (
        keys.new_zeros(shape, dtype=torch.promote_types(keys.dtype, torch.float32)) for _ in range(3)
    )
    start = 0
    for weights in attention_blocks(queries, keys, places.expand(rows, 1, n), 0, window):
        behind = torch.arange(start, start + weights.shape[3], device=keys.device).unsqueeze(1) - places
        received += weights.sum(dim=3)
        own += (weights * (behind == 0)).sum(dim=3)
        close += (weights * (behind <= local)).sum(dim=3)
        start += weights.shape[3]
    by_key = received.sum(dim=2)
    kept = special.unsqueeze(1).expand(rows, kv_heads, n)
    ladder = [kept, kept | punctuation.unsqueeze(1), kept | punctuation.unsqueeze(1) | most(by_key, frequent)]
    shares = [torch.where(kept.unsqueeze(2), received, own).sum(dim=3) for kept in ladder]
    shares.append(torch.where(ladder[-1].unsqueeze(2), received, close).sum(dim=3))
    return torch.stack(shares, dim=3) / n, by_key


def cheapest(shares: Tensor, recovery: float) -> Tensor:
    """The first policy of the ladder that recovers enough for every query head of a key head.

    Args:
        shares: `[rows, kv_heads, group, 4]`, as `recovered` returns them.
        recovery: T, how much is enough, 0 to 1.

    Returns:
        `[rows, kv_heads]`, SPECIAL to FULL.

    Examples:
        >>> cheapest(torch.tensor([[[[0.5, 0.6, 0.9, 0.9], [0.1, 0.9, 0.9, 1.0]]]]), 0.6).item() == PUNCTUATION
        True
    """
    return ((shares.amin(dim=2) >= recovery).cumsum(dim=2) == 0).sum(dim=2)


def most(received: Tensor, count: int) -> Tensor:
    """Where the largest numbers of `[..., n]` stand, of equal ones the first: bool, the same shape.

    Examples:
        >>> most(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0]), 2).tolist()
        [False, True, False, True, False]
    """
    best = received.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(received, dtype=torch.bool).scatter_(-1, best, True)
