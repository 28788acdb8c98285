"""Attention weights: PyTorch's own attention on identity values, blocks, windows, precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.inference.kv_cache.dropped import attention_scores
from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("at_once", [1, 300, 2**22])
def test_weights_are_those_of_attention(window, at_once, generator, monkeypatch):
    """Oracle: PyTorch's attention on values that are the identity, whose output is the weights; keys in any order."""
    monkeypatch.setattr(attention_scores, "AT_ONCE", at_once)
    rows, kv_heads, tokens, time = 2, 3, 11, 5
    q = torch.randn(rows, 6, time, 8, generator=generator)
    k = torch.randn(rows, kv_heads, tokens, 8, generator=generator)
    at = torch.stack([torch.randperm(20, generator=generator)[:tokens] for _ in range(rows * kv_heads)]).view(
        rows, kv_heads, tokens
    )
    at[..., 0] = 18  # a key that the first query sees
    behind = torch.arange(18, 18 + time)[:, None] - at[:, :, None]
    seen = (behind >= 0) & (behind < (window or 100))
    expected = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(2, 1),
        torch.eye(tokens).expand(rows, 6, tokens, tokens),
        attn_mask=seen.repeat_interleave(2, 1),
    )
    blocks = list(attention_blocks(q, k, at, 18, window))
    if window == 4:
        seen_by_all = seen.any(-1).all()
        if not seen_by_all:  # a query that sees no key is not one that a cache meets
            blocks = [x.nan_to_num() for x in blocks]
            expected = expected.nan_to_num()
    assert len(blocks) == (1 if at_once == 2**22 else 5 if at_once == 1 else 3)
    assert_close(torch.cat(blocks, dim=3).flatten(1, 2), expected)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(dtype, wide, generator):
    """Oracle: the same in float64; bfloat16 has no part in it."""
    q, k = (torch.randn(1, 2, 9, 16, generator=generator).to(dtype) for _ in range(2))
    at = torch.arange(9).view(1, 1, 9)
    (found,) = attention_blocks(q, k, at, 0)
    (expected,) = attention_blocks(q.double(), k.double(), at, 0)
    assert found.dtype == wide
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
