"""Who sees whom: masks against two loops over positions, and none where none is needed."""

import pytest
import torch

from refimpl.model.step import Step, positions_of

CPU = torch.device("cpu")


def step(start, time, padding=None, score_bias=None):
    positions = positions_of(start, start + time, padding, CPU)
    return Step(start, positions, torch.zeros(1), torch.zeros(1), None, padding, score_bias)


def sees(q, k, window):
    """By the rules: the past and itself, inside the window, no padding; padding sees itself."""
    return k <= q and (k >= 0 or k == q) and (window is None or q - k < window)


@pytest.mark.parametrize("padding", [None, [0, 2, 6]])
@pytest.mark.parametrize(("start", "time", "kept"), [(0, 7, 7), (5, 3, 8), (5, 3, 6), (6, 1, 7), (6, 1, 2)])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 8])
def test_masks_written_out(padding, start, time, kept, window):
    """Oracle: brute force, over every row, query and key; no mask stands for all, `causal` for the triangle."""
    gaps = padding or [0]
    mask, causal = step(start, time, padding and torch.tensor(padding)).mask(kept, None, window)
    end = start + time
    expected = torch.tensor(
        [[[sees(q - g, k - g, window) for k in range(end - kept, end)] for q in range(start, end)] for g in gaps]
    )
    if mask is None:
        mask = torch.ones(1, 1, time, kept, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    assert torch.equal(mask[:, 0], expected)


def test_no_mask_where_none_is_needed():
    """Oracle: by hand: a whole prompt, and a single token after all of its past."""
    assert step(0, 5).mask(5, None, None) == (None, True)
    assert step(0, 5).mask(5, None, 5) == (None, True)
    assert step(9, 1).mask(10, None, None) == (None, False)
    assert step(9, 1).mask(4, None, 4) == (None, False)
    assert step(9, 1).mask(5, None, 4)[0] is not None
    assert step(4, 5).mask(9, None, None)[0] is not None


def test_layers_share_a_mask_only_if_it_is_theirs():
    """Oracle: identity of objects; positions that a cache tells are of one layer."""
    shared = step(4, 5)
    first = shared.mask(9, None, None)[0]
    assert shared.mask(9, None, None)[0] is first
    assert shared.mask(9, None, 3)[0] is not first
    assert shared.mask(8, None, None)[0].shape[-1] == 8
    told = shared.mask(2, torch.tensor([[0, -1]]), None)[0]
    assert told.tolist() == [[[[True, False]] * 5]]


def test_told_positions_by_key_head_and_with_a_bias():
    """Oracle: brute force; a bias of 4 query heads over 2 key heads."""
    told = torch.tensor([[[0, 3, 6], [5, -1, 1]]])
    mask, _ = step(5, 2).mask(3, told, None)
    assert mask.tolist() == [[[[sees(q, k, None) for k in head] for q in (5, 6)] for head in told[0].tolist()]]
    biased, _ = step(
        5,
        2,
        score_bias=lambda q, k: (
            (k - q).expand(1, 4, 2, 3).float() if k.shape[1] == 1 else (k - q).repeat_interleave(2, 1).float()
        ),
    ).mask(3, told, None)
    for head in range(4):
        for i, q in enumerate((5, 6)):
            for j, k in enumerate(told[0, head // 2].tolist()):
                assert biased[0, head, i, j] == (k - q if sees(q, k, None) else float("-inf"))


@pytest.mark.parametrize("window", [None, 2])
def test_told_positions_of_each_query_own(window):
    """Oracle: brute force over rows, queries and keys; two branches behind one past, whose second row has padding."""
    positions = torch.tensor([[2, 3, 3, 4], [1, 2, 2, 3]])
    tree = Step(0, positions, torch.zeros(1), torch.zeros(1), None, None, None)
    unseen = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()  # 3 stands behind 1
    past = torch.tensor([[0, 1], [-1, 0]])[:, None].expand(2, 4, 2)
    told = torch.cat((past, positions[:, None].expand(2, 4, 4).masked_fill(unseen, -1)), dim=2)
    mask, causal = tree.mask(6, told[:, None], window)
    assert not causal and mask.shape == (2, 1, 4, 6)
    for row in range(2):
        for query in range(4):
            at = int(positions[row, query])
            assert mask[row, 0, query].tolist() == [sees(at, k, window) for k in told[row, query].tolist()]
