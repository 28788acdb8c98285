"""What policies leave of a prompt's attention, and which is chosen."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.dropped.head_policies import cheapest, most, recovered


@pytest.mark.parametrize(("kv_heads", "window"), [(2, None), (4, 6)])
def test_shares_are_distances_of_attention(kv_heads, window, generator):
    """Oracle: Eq. (1) as it stands: attention over what is kept, computed anew for each policy, and half of its summed distance from all."""
    n, special, punctuation, frequent, local = 13, [0, 5], [3, 9], 4, 3
    q, k = (torch.randn(2, heads, n, 8, generator=generator, dtype=torch.float64) for heads in (4, kv_heads))
    marks = [torch.zeros(2, n, dtype=torch.bool) for _ in range(2)]
    marks[0][:, special], marks[1][:, punctuation] = True, True
    shares, received = recovered(q, k, *marks, frequent, local, window)
    behind = torch.arange(n)[:, None] - torch.arange(n)
    seen = (behind >= 0) & (behind < (window or n))
    scores = q @ k.repeat_interleave(4 // kv_heads, dim=1).mT / 8**0.5
    full = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    sums = full.unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
    assert_close(received, sums)
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        key_head = head // (4 // kv_heads)
        kept, found = torch.eye(n, dtype=torch.bool), []
        for more in (special, punctuation, sums[row, key_head].topk(frequent).indices.tolist()):
            kept[:, more] = True
            found.append(kept.clone())
        found.append(kept | ((behind >= 0) & (behind <= local)))
        for policy, keeps in enumerate(found):
            over = scores[row, head].masked_fill(~(seen & keeps), float("-inf")).softmax(dim=-1)
            distance = (full[row, head] - over).abs().sum(dim=-1).mean() / 2
            assert_close(shares[row, key_head, head % (4 // kv_heads), policy], 1 - distance)
    assert 0.05 < shares.min() < shares.max() < 0.99  # negative control


def test_the_cheapest_that_recovers_enough_for_all_heads_of_a_key_head():
    """Oracle: by hand; a ladder need not rise where the threshold lies between, and above all of it everything is kept."""
    shares = torch.tensor([[[[0.2, 0.5, 0.7, 0.9]], [[0.6, 0.6, 0.6, 0.6]]]])
    chosen = [cheapest(shares, recovery)[0].tolist() for recovery in (0, 0.2, 0.5, 0.65, 0.9, 1)]
    assert chosen == [[0, 0], [0, 0], [1, 0], [2, 4], [3, 4], [4, 4]]
    assert cheapest(shares.transpose(1, 2), 0.5).tolist() == [[1]]  # two query heads, of which one would do with 0
    assert cheapest(shares.transpose(1, 2), 0.65).tolist() == [[4]]


def test_most_keeps_the_first_of_equals():
    """Oracle: by hand."""
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 9.0]])
    assert most(x, 2).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert not most(x, 0).any()
    assert most(x, 7).all()
