"""Trees guessed from features, against the layer read over whole texts, branch by branch; draws without replacement."""

import itertools

import pytest
import torch

from refimpl.inference.decoding.draft_and_verify import Rows
from refimpl.inference.decoding.speculative.eagle import TREE
from refimpl.inference.decoding.speculative.feature_draft import FeatureDraft
from refimpl.inference.decoding.speculative.feature_tree import FeatureTree, Shape, distinct
from refimpl.model.generate import pad, probabilities
from tests.inference.decoding.chances import FALSE_ALARM, p_value

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 0, 0)]


def test_the_official_tree_by_hand():
    """Oracle: by hand, from the list of the official code: 25 guesses in 5 levels; ten nodes have children, of which four are first."""
    shape = Shape(TREE)
    assert [shape.paths[i] for i in (1, 5, 12, 13, 20, 21, 24, 25)] == [
        (0,), (0, 0), (3, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
    ]  # fmt: skip
    assert [int((shape.upto(5).depths == depth).sum()) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert (shape.depth, shape.widest, len(shape.paths)) == (5, 4, 26)
    assert shape.inner.depths.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert [len(shape.upto(depth).parents) for depth in range(6)] == [1, 5, 13, 21, 24, 26]


# Guesses


@torch.no_grad()
def expected(draft, target, text, node):
    """Logits of what follows a node, from the layer read over the text and the node's branch, whole and without a cache.

    Args:
        text: with the root at its end.
        node: tokens from behind the root to it.
    """
    features, tokens = target.hidden(torch.tensor([text[:-1]])), text[1:]
    for i in range(len(node) + 1):
        found = draft(target, torch.tensor([[*tokens, *node[:i]]]), features)
        features = torch.cat((features, found[:, -1:]), dim=1)  # its own, in the place of the target's
    return target.logits(found[0, -1])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guesses_are_those_of_the_layer_read_whole(target, generator, temperature):
    """Oracle: branch by branch, without a cache, in three rounds of padded rows that part: likeliest children, or what they were drawn from.

    Features behind the text are the layer's own there, too; what stood in the last round is read again from the target's.
    """
    draft = FeatureDraft(target, generator)
    texts = [[5, 7, 33, 2, 60, 1], [8], [3, 41, 5]]
    tokens, padding = pad(texts)
    rows = Rows.begin(tokens, 30, ())
    grower = FeatureTree(
        draft, target, PATHS, temperature=temperature, generator=generator, padding=padding, tokens=tokens, n=30
    )
    with torch.no_grad():
        hidden = target.hidden(tokens, padding=padding)
    guesses = grower.propose(rows)
    assert guesses.tokens.shape == (3, 1) and not guesses.open.any() and grower.calls == 0
    grower.see_prompt(hidden)
    path, kept = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for round_ in range(3):
        following = torch.tensor([9, 17, 4]) + round_
        rows.append(guesses.tokens.gather(1, path[:, 1:]), kept, following)
        grower.learn(rows, guesses, hidden[:, -guesses.tokens.shape[1] :], path, kept)
        with torch.no_grad():
            guesses = grower.propose(rows)
        assert grower.calls == 4 * (round_ + 1)  # one that reads the text, and three levels that have children
        texts = [rows.text[i, padding[i] : rows.lengths[i]].tolist() for i in range(3)]
        shape, inner = grower.shape, [i for i in range(10) if i in guesses.tree.parents]
        for row, text in enumerate(texts):
            assert guesses.tokens[row, 0] == text[-1]
            for i, place in enumerate(inner):
                ancestors = [shape.paths.index(shape.paths[place][:d]) for d in range(1, len(shape.paths[place]) + 1)]
                logits = expected(draft, target, text, guesses.tokens[row, ancestors].tolist())
                children = guesses.tokens[row, guesses.tree.parents == place].tolist()
                assert len({*children}) == len(children)
                if temperature == 0:
                    assert children == logits.topk(len(children)).indices.tolist()
                else:
                    wanted = probabilities(logits, temperature)
                    torch.testing.assert_close(
                        grower.drawn_from[row, i], wanted, rtol=1e-3, atol=1e-5
                    )  # of logits of size 10
        path, kept = torch.tensor([[0, 2, 6, 7], [0, 1, 5, 5], [0, 3, 3, 3]]), torch.tensor([3, 2, 0])
        hidden = torch.zeros(3, 10, 32)
        for row, text in enumerate(texts):
            nodes = path[row, : kept[row] + 1]
            with torch.no_grad():
                whole = target.hidden(torch.tensor([text[:-1] + guesses.tokens[row, nodes].tolist()]))
            hidden[row, nodes] = whole[0, -len(nodes) :]


def test_the_tree_ends_where_there_is_no_room(target, generator):
    """Oracle: by hand: with n = 3 and one token behind the prompt, one guess fits in before the last."""
    tokens = torch.tensor([[5, 7]])
    grower = FeatureTree(
        FeatureDraft(target, generator),
        target,
        PATHS,
        temperature=0.0,
        generator=None,
        padding=None,
        tokens=tokens,
        n=3,
    )
    rows, none = Rows.begin(tokens, 3, ()), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        grower.see_prompt(target.hidden(tokens))
        rows.append(tokens[:, :0], none, torch.tensor([9]))
        assert grower.propose(rows).tree.parents.tolist() == [-1, 0, 0, 0] and grower.calls == 1
        rows.append(tokens[:, :0], none, torch.tensor([9]))
        assert grower.propose(rows).tree.parents.tolist() == [-1] and grower.calls == 1


# Draws


def test_draws_are_those_without_replacement(generator):
    """Oracle: closed form: of pairs, q(a) q(b) / (1 - q(a)); a chi-square over 20,000 draws. What has no chance is never drawn before.

    Control: the other order is found out.
    """
    q = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    drawn = distinct(q.expand(20_000, -1), 5, generator)
    chances = torch.tensor(
        [0.0 if a == b else float(q[a] * q[b] / (1 - q[a])) for a, b in itertools.product(range(5), repeat=2)]
    )
    counts = [(drawn[:, i] * 5 + drawn[:, j]).bincount(minlength=25) for i, j in ((0, 1), (1, 0))]
    assert p_value(counts[0], chances) > FALSE_ALARM > 1e-9 > p_value(counts[1], chances)
    assert (drawn[:, 4] == 1).all() and (drawn.sort(dim=1).values == torch.arange(5)).all()
