"""The rule that follows the target through a tree, and the loop: rows, stops and counts, with growers that are written out."""

import torch

from refimpl.inference.decoding.grow_and_verify import Guesses, choose, follow, grow_and_verify
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import generate

TREE = Tree.of([-1, 0, 0, 1, 1, 2, 3, 6, 5])

# The rule


def scripted(target, choices):
    """Guesses on `TREE` whose tokens are their node numbers, and a choice behind each node that is written out."""
    guesses = Guesses(TREE, torch.tensor([[50, 1, 2, 3, 4, 5, 6, 7, 8]]).repeat(len(choices), 1), torch.ones(1, 9, dtype=torch.bool).repeat(len(choices), 1))  # fmt: skip
    guesses.open[:, 0] = False
    table = torch.zeros(len(choices), 9)
    for row, chosen in enumerate(choices):
        for node, token in chosen.items():
            table[row, node] = token
    return guesses, table[..., None]


def test_the_target_is_followed_as_far_as_it_was_guessed():
    """Oracle: by hand. To a leaf and one token on; to an inner node; not at all; and not through a closed node."""
    guesses, hidden = scripted(None, [{0: 1, 1: 3, 3: 6, 6: 7, 7: 9}, {0: 2, 2: 5, 5: 4}, {0: 60}, {0: 2, 2: 5, 5: 8}])
    guesses.open[3, 5] = False
    path, kept, following = follow(guesses, hidden, lambda states: states[:, 0].long())
    assert kept.tolist() == [4, 2, 0, 1] and following.tolist() == [9, 4, 60, 5]
    assert path[0].tolist() == [0, 1, 3, 6, 7] and path[1, :3].tolist() == [0, 2, 5] and path[3, :2].tolist() == [0, 2]


def test_branches_that_begin_alike_are_followed_together():
    """Oracle: by hand: of two chains `5 6 7` and `5 6 8` the second is right; where it ends the first has its node, too."""
    tree = Tree.of([-1, 0, 1, 2, 0, 4, 5])
    guesses = Guesses(tree, torch.tensor([[9, 5, 6, 7, 5, 6, 8]]), torch.tensor([[False] + [True] * 6]))
    choices = torch.tensor([[5, 6, 8, 0, 6, 8, 3]])[..., None]
    path, kept, following = follow(guesses, choices, lambda states: states[:, 0])
    assert path.tolist() == [[0, 1, 2, 6]] and kept.tolist() == [3] and following.tolist() == [3]


def test_guesses_taken_in_turn_come_to_the_same(generator):
    """Oracle: theorem: accept x with p(x), else set p(x) to 0 and go on, else draw from what is left: each token has its p.

    Summed over all outcomes for guesses 3, 0, 3, 5; no draw is made. Control: without p(x) set to 0 it is another.
    """
    p = (2 * torch.randn(7, generator=generator, dtype=torch.float64)).softmax(0)
    for cleared in (True, False):
        chance, left, reached = torch.zeros_like(p), p.clone(), torch.ones((), dtype=torch.float64)
        for guess in (3, 0, 3, 5):
            chance[guess] += reached * left[guess]
            reached = reached * (1 - left[guess])
            if cleared:
                left[guess] = 0
                left = left / left.sum()
        assert torch.allclose(chance + reached * left, p) == cleared


def test_choices_are_the_likeliest_or_drawn(target, generator):
    """Oracle: argmax; and the softmax at temperature 2, over 20,000 draws, to five standard errors."""
    hidden = torch.randn(1, 32, generator=generator)
    logits = target.logits(hidden)
    assert torch.equal(choose(target, hidden, temperature=0, generator=None), logits.argmax(-1))
    drawn = (
        choose(target, hidden.expand(20_000, -1), temperature=2.0, generator=generator).bincount(minlength=61) / 20_000
    )
    p = (logits[0] / 2).softmax(-1)
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


# The loop


class Scripted:
    """Three branches of two guesses, one of them right as far as told: in each round, for each row, which and how far."""

    calls = 0
    tree = Tree.of([-1, 0, 0, 0, 1, 2, 3])

    def __init__(self, follows, right):
        self.follows, self.right, self.seen = follows, iter(right), []

    def propose(self, rows):
        tokens = torch.zeros(2, 7, dtype=torch.int64)
        for row, (which, far) in enumerate(next(self.right)):
            at = int(rows.lengths[row]) - 3
            true = [*self.follows[row].tolist(), 0, 0][at : at + 2]
            for i in range(3):
                good = far if i == which else 0
                tokens[row, [1 + i, 4 + i]] = torch.tensor(
                    [(x + (good <= d) * (1 + i)) % 61 for d, x in enumerate(true)]
                )
        tokens[:, 0] = rows.last(1)[:, 0]
        open_ = torch.ones(2, 7, dtype=torch.bool)
        open_[:, 0] = False
        return Guesses(self.tree, tokens, open_)

    def learn(self, rows, guesses, hidden, path, kept):
        self.seen.append((rows.lengths.tolist(), kept.tolist(), path[:, 1].tolist()))


def test_rows_grow_at_their_own_pace(target):
    """Oracle: by hand. Rows take what is right and one token; 9 tokens; prompts are read with the first tree, in one call."""
    prompts = torch.tensor([[5, 7, 33], [8, 1, 2]])
    follows = generate(target, prompts, 9)
    grower = Scripted(
        follows, [[(0, 2), (2, 1)], [(1, 0), (1, 2)], [(2, 2), (0, 2)], [(0, 2), (1, 1)], [(0, 0), (0, 0)]]
    )
    rule = lambda guesses, hidden: follow(guesses, hidden, lambda x: choose(target, x, temperature=0, generator=None))  # noqa: E731
    decoded = grow_and_verify(target, prompts, 9, grower, rule)
    assert torch.equal(decoded.tokens, follows)
    assert [seen[:2] for seen in grower.seen] == [
        ([6, 5], [2, 1]), ([7, 8], [0, 2]), ([10, 11], [2, 2]), ([12, 12], [1, 0])
    ]  # fmt: skip
    assert grower.seen[0][2] == [1, 3]
    assert decoded.target_calls == 4 and decoded.rounds.tolist() == [4, 4]
    assert decoded.accepted.tolist() == [5, 5]
    assert decoded.drafted.tolist() == [
        6 + 6 + 6 + 3,
        6 + 6 + 6 + 0,
    ]  # in the last round there is room for 1 and for none
    assert decoded.depths.tolist() == [[2, 2, 2, 1], [2, 2, 2, 0]] and decoded.widths.tolist() == [7] * 4
    assert decoded.stood.tolist() == [[2, 0, 2, 1], [1, 2, 2, 0]]
    assert decoded.rejected.tolist() == [
        1,
        1,
    ]  # levels at which no guess was right: a leaf has none, nor where there is no room


def test_a_stop_token_inside_a_branch_ends_a_row(target):
    """Oracle: `generate` with that stop token; the rest of the branch was right, and is not taken."""
    prompts = torch.tensor([[5, 7, 33], [8, 1, 2]])
    follows = generate(target, prompts, 9)
    stop = int(follows[0, 1])
    grower = Scripted(follows, [[(0, 2), (0, 2)]] * 9)
    rule = lambda guesses, hidden: follow(guesses, hidden, lambda x: choose(target, x, temperature=0, generator=None))  # noqa: E731
    decoded = grow_and_verify(target, prompts, 9, grower, rule, stop={stop})
    assert torch.equal(decoded.tokens, generate(target, prompts, 9, stop={stop}))
    assert decoded.rounds[0] == 1 and decoded.accepted[0] == 1 + int(follows[0, 0] != stop)
    grower = Scripted(follows, [[(0, 1), (0, 2)]] * 9)  # what is wrong behind the stop token was not replaced
    decoded = grow_and_verify(target, prompts, 9, grower, rule, stop={int(follows[0, 0])})
    assert (decoded.rounds[0], decoded.accepted[0], decoded.rejected[0]) == (1, 1, 0)
