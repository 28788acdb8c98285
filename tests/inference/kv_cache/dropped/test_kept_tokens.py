"""What heads keep: by hand, and against lists of tokens through many random steps."""

import pytest
import torch

from refimpl.inference.kv_cache.dropped.kept_tokens import KeptTokens


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("room", [None, 7])
def test_against_lists(shared, room, generator):
    """Oracle: a list of tokens for each head, of which the least worthy are taken out."""
    rows, heads, budget, seen = 2, 1 if shared else 3, 6, 0
    held = KeptTokens(room=room, shared=shared)
    lists = [[[] for _ in range(3)] for _ in range(rows)]
    for time in [9, 1, 1, 1, 3, 1, 1, 2, 2, 1, 20, 1, 1]:
        x = torch.arange(seen, seen + time).view(1, 1, time, 1) + 100 * torch.arange(rows * 3).view(rows, 3, 1, 1)
        held.append(x.float(), -x.float(), seen, x[:, :heads, :, :] * 2)
        seen += time
        for row in lists:
            for head in row:
                head += range(seen - time, seen)
        taste = torch.randperm(seen, generator=generator) if shared else None
        tastes = [
            [taste if shared else torch.randperm(seen, generator=generator) for _ in range(3)] for _ in range(rows)
        ]
        at = held.positions.long()
        worth = torch.stack([torch.stack([tastes[r][h][at[r, h]] for h in range(heads)]) for r in range(rows)])
        k, v, positions = held.entries()
        for r in range(rows):
            for h in range(3):
                own = at[r, 0 if shared else h]
                assert sorted(own.tolist()) == sorted(lists[r][h])
                assert torch.equal(k[r, h, :, 0], own + 100.0 * (3 * r + h))
                assert torch.equal(v, -k)
                lists[r][h] = sorted(lists[r][h], key=lambda j, r=r, h=h: -int(tastes[r][h][j]))[:budget]
        assert torch.equal(held.notes[..., 0], 2 * k[:, :heads, :, 0].long())
        assert (positions is None) == (not held.dropped)
        before = k.clone()
        held.cut(worth, budget)
        assert torch.equal(k, before)  # what was given out is not touched
        if room and seen > 9:
            assert held._buffers[0].shape[2] == room


def test_nothing_goes_from_what_fits():
    """Oracle: by hand."""
    held, x = KeptTokens(), torch.zeros(1, 1, 4, 2)
    held.append(x, x, 0)
    held.cut(torch.zeros(1, 1, 4), 4)
    assert (held.length, held.entries()[2]) == (4, None)
    held.cut(torch.tensor([[[3.0, 1.0, 2.0, 4.0]]]), 0)
    assert (held.length, held.positions.shape[2]) == (0, 0)


@pytest.mark.parametrize(("keep", "left"), [(4, [0, 1, 2, 3]), (3, [0, 1, 2]), (2, [0, 2])])
def test_of_equals_the_earlier_stay(keep, left):
    """Oracle: by hand."""
    held, x = KeptTokens(), torch.zeros(1, 1, 5, 2)
    held.append(x, x, 0)
    held.cut(torch.tensor([[[2.0, 1.0, 3.0, 1.0, 1.0]]]), keep)
    held.append(x[:, :, :1], x[:, :, :1], 5)
    assert held.positions.tolist() == [[[*left, 5]]]


def test_room_grows_by_sixteenths_up_to_the_budget():
    """Oracle: by hand: 32, then 33 + 2, and never beyond 40 while that is enough."""
    held, x = KeptTokens(room=40), torch.zeros(1, 1, 32, 2)
    sizes = []
    held.append(x, x, 0)
    for i in range(8):
        sizes.append(held._buffers[0].shape[2])
        held.append(x[:, :, :1], x[:, :, :1], 32 + i)
    assert sizes == [32, 35, 35, 35, 38, 38, 38, 40]
