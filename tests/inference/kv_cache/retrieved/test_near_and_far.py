"""Two kinds of keys under one softmax."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.inference.kv_cache.retrieved.near_and_far import near_and_far


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_attention_over_both(kv_heads, generator):
    """Oracle: PyTorch's attention, of queries and keys twice as wide, in which each kind has the half that is its own."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = draw(2, 4, 3, 8), draw(2, 4, 3, 8)
    keys, values = ((draw(2, kv_heads, 7, 8), draw(2, kv_heads, 5, 8)) for _ in range(2))
    seen = torch.rand(3, 7, generator=generator) < 0.7, torch.rand(2, 1, 1, 3, 5, generator=generator) < 0.7
    seen[0][:, 0] = True
    found, received = near_and_far(queries, keys, values, seen)
    k = torch.cat((F.pad(keys[0], (0, 8)), F.pad(keys[1], (8, 0))), dim=2).repeat_interleave(4 // kv_heads, dim=1)
    v = torch.cat(values, dim=2).repeat_interleave(4 // kv_heads, dim=1)
    mask = torch.cat((seen[0].expand(2, 1, 3, 7), seen[1][:, 0]), dim=3)
    both = torch.cat(queries, dim=3)
    assert_close(found, F.scaled_dot_product_attention(both, k, v, attn_mask=mask, scale=8**-0.5))
    weights = (both @ k.mT / 8**0.5).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    assert_close(received, weights[..., :7].sum(dim=2))
