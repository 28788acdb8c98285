"""Trees of tokens: what the target says behind a branch is what it says of that branch alone; one branch is kept."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.draft_and_verify import Rows
from refimpl.inference.decoding.tree import Tree, TreeCache
from refimpl.model.generate import pad

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 5]
TREE = Tree.of(PARENTS)


def branch(node):
    """Nodes from the root to this one."""
    return [] if node < 0 else [*branch(PARENTS[node]), node]


# Shapes


def test_a_tree_by_hand():
    """Oracle: by hand, and parents followed one by one."""
    assert TREE.depths.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 3]
    for node in range(9):
        assert TREE.sees[node].nonzero().flatten().tolist() == sorted(branch(node))
    assert not TREE.is_chain and Tree.of([-1, 0, 1, 2]).is_chain and Tree.of([-1]).is_chain
    assert Tree.of([-1, 0, 0]).behind(2).parents.tolist() == [-1, 0, 1, 2, 2]


@pytest.mark.parametrize("parents", [[], [0], [-1, -1], [-1, 2, 0], [-1, 1]])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError, match="must begin with -1"):
        Tree.of(parents)


# Reading


@torch.no_grad()
def alone(target, text):
    """The last hidden state of a text, read whole and without a cache."""
    return target.hidden(torch.tensor([text]))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_each_branch_is_read_as_if_alone_and_one_is_kept(target, generator, biased):
    """Oracle: whole forwards over text and branch, without a cache; rows of different lengths and paddings, two trees in a row.

    With rotary positions, windows of 3 and 5 tokens, or a bias that falls with distance. Control: other branches are not seen,
    which a chain of the same tokens would.
    """
    if biased:
        target.score_bias = lambda q, k: -(q - k) * torch.tensor([0.1, 0.2, 0.4, 0.8]).view(4, 1, 1)
    texts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (7, 3, 5)]
    tokens, padding = pad(texts)
    cache = TreeCache()
    target.hidden(tokens[:, :-1], cache, padding)
    left = cache.lengths
    for path, kept in (([[0, 1, 3, 6], [0, 2, 5, 8], [0, 1, 4, 7]], [3, 2, 0]), ([[0, 2], [0, 1], [0, 2]], [0, 1, 1])):
        cache.truncate(left)
        guesses = torch.randint(0, 61, (3, 9), generator=generator)
        guesses[:, 0] = torch.tensor([text[-1] for text in texts])
        cache.tree = TREE
        hidden = target.hidden(guesses, cache, positions=(left - padding)[:, None] + TREE.depths)
        for row, text in enumerate(texts):
            for node in range(9):
                expected = alone(target, text + guesses[row, branch(node)[1:]].tolist())
                assert_close(hidden[row, node], expected, rtol=1e-4, atol=1e-4)  # of size 10, through 3 layers
        chain = alone(target, texts[0] + guesses[0, 1:].tolist())
        assert not torch.allclose(hidden[0, 8], chain, atol=0.1)
        cache.keep(torch.tensor(path), torch.tensor(kept))
        texts = [
            text + guesses[row, path[row][1 : 1 + n]].tolist() + [7] for row, (text, n) in enumerate(zip(texts, kept, strict=True))
        ]  # fmt: skip
        left = left + 1 + torch.tensor(kept)
        assert torch.equal(cache.lengths, left)
    last = torch.tensor([[7]] * 3)
    hidden = target.hidden(last, cache, cache.shifted(padding))
    assert_close(hidden[:, 0], torch.stack([alone(target, text) for text in texts]), rtol=1e-4, atol=1e-4)


def test_what_a_row_reads_of_a_tree_costs_no_lasting_memory(target):
    """Oracle: by hand: after each round a row holds its text but for the last token."""
    rows = Rows.begin(torch.tensor([[5, 7, 33]]), 9, ())
    cache = TreeCache(20)
    target.hidden(rows.text[:, :2], cache)
    cache.tree = TREE
    target.hidden(torch.zeros(1, 9, dtype=torch.int64), cache, positions=2 + TREE.depths[None])
    cache.keep(torch.tensor([[0, 1, 3]]), torch.tensor([2]))
    assert cache.length == 5 and cache.tree is None
    assert cache.nbytes == 3 * 2 * 2 * 20 * 8 * 4  # layers, k and v, heads, room, dim, bytes
