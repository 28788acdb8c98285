"""Trees that are read level by level: what is said at a node is what is said behind its branch alone."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.level_cache import LevelCache
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import pad

PARENTS = [-1, 0, 0, 0, 1, 1, 3, 4, 6]
TREE = Tree.of(PARENTS)


def branch(node):
    """Nodes from behind the root to this one."""
    return [] if node <= 0 else [*branch(PARENTS[node]), node]


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_each_node_is_read_as_if_its_branch_stood_alone(target, generator, biased):
    """Oracle: whole forwards over text and branch, without a cache; rows of different lengths and paddings, a second tree in the end.

    With rotary positions, windows, or a bias that falls with distance. Control: what a chain of the same tokens would see is another
    thing.
    """
    if biased:
        target.score_bias = lambda q, k: -(q - k) * torch.tensor([0.1, 0.2, 0.4, 0.8]).view(4, 1, 1)
    texts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (7, 3, 5)]
    tokens, padding = pad(texts)
    cache = LevelCache()
    target.hidden(tokens, cache, padding)
    for _ in range(2):
        left = cache.lengths
        guesses = torch.randint(0, 61, (3, 9), generator=generator)
        cache.grow(TREE)
        for depth in (1, 2, 3):
            level = (TREE.depths == depth).nonzero().flatten()
            positions = ((left - padding)[:, None] + depth - 1).expand(-1, len(level))
            hidden = target.hidden(guesses[:, level], cache, positions=positions)
            for row, text in enumerate(texts):
                for i, node in enumerate(level.tolist()):
                    whole = target.hidden(torch.tensor([text + guesses[row, branch(node)].tolist()]))
                    assert_close(hidden[row, i], whole[0, -1], rtol=1e-4, atol=1e-4)  # of size 10, through 3 layers
        chain = target.hidden(torch.tensor([texts[2] + guesses[2, 1:].tolist()]))[0, -1]
        assert not torch.allclose(hidden[2, -1], chain, atol=0.1)
        cache.forget()
        assert torch.equal(cache.lengths, left)
        cache.truncate(left - torch.tensor([1, 0, 2]))  # rows part
        texts = [text[: len(text) - n] for text, n in zip(texts, (1, 0, 2), strict=True)]


def test_without_a_tree_it_is_a_plain_cache(target, generator):
    """Oracle: the whole forward; forgetting a tree that there is not changes nothing."""
    tokens, cache = torch.randint(0, 61, (2, 9), generator=generator), LevelCache(reserve=9)
    first = target(tokens[:, :4], cache)
    cache.forget()
    assert cache.length == 4
    assert_close(torch.cat((first, target(tokens[:, 4:], cache)), dim=1), target(tokens), rtol=1e-4, atol=1e-4)
