"""Medusa: typical acceptance against lists, draws against exact chances, calls on a Markov chain."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from refimpl.inference.decoding.grow_and_verify import Guesses
from refimpl.inference.decoding.speculative import medusa as module
from refimpl.inference.decoding.speculative.medusa import Medusa, typical
from refimpl.inference.decoding.speculative.medusa_heads import MedusaHeads, likeliest_paths
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import generate, pad
from tests.inference.decoding.chances import chances, number, p_value, tiny
from tests.inference.decoding.unseen import unseen_text

PROMPTS = [[5, 7, 33, 2, 60, 1], [8], [3, 41, 5]]

# Acceptance


GIVEN = SimpleNamespace(logits=lambda hidden: hidden)  # a target whose hidden states are its logits


def by_lists(tree, tokens, open_, logits, temperature, epsilon):
    """The official procedure, one root-to-leaf path after the other: the longest plausible, of these the likeliest."""
    best = (0, 0.0, [0])
    for leaf in range(len(tree.parents)):
        path = [leaf]
        while path[0] > 0:
            path.insert(0, int(tree.parents[path[0]]))
        length, likelihood = 0, 0.0
        for parent, node in itertools.pairwise(path):
            p = (logits[parent] / temperature).softmax(-1)
            entropy = -sum(float(x) * math.log(float(x) + 1e-5) for x in p)
            chance = float(p[tokens[node]])
            if not open_[node] or chance <= min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)):
                break
            length, likelihood = length + 1, likelihood + math.log(chance)
        if length and (length > best[0] or (length == best[0] and likelihood > best[1])):
            best = (length, likelihood, path[: length + 1])
    return best[0], best[2], int(logits[best[2][-1]].argmax())


def test_typical_acceptance_is_that_of_lists(generator):
    """Oracle: paths compared one by one, in 60 rows; distributions are flat at some nodes and sharp at others; all lengths occur."""
    tree = Tree.of([-1, 0, 0, 0, 1, 1, 2, 4, 6])
    logits = torch.randn(60, 9, 5, generator=generator) * (0.3 + 6 * torch.rand(60, 9, 1, generator=generator))
    tokens, open_ = torch.randint(0, 5, (60, 9), generator=generator), torch.rand(60, 9, generator=generator) > 0.1
    open_[:, 0] = False
    path, kept, following = module._typical(
        Guesses(tree, tokens, open_), logits, target=GIVEN, temperature=0.7, epsilon=0.09
    )
    for row in range(60):
        length, nodes, token = by_lists(tree, tokens[row], open_[row], logits[row], 0.7, 0.09)
        assert (int(kept[row]), path[row, : length + 1].tolist(), int(following[row])) == (length, nodes, token)
    assert set(kept.tolist()) == {0, 1, 2, 3}


def test_the_likelier_branch_by_hand():
    """Oracle: by hand: of two branches of two plausible guesses, 0.6 * 0.4 is more than 0.4 * 0.5, though 0.5 is more than 0.4."""
    tree = Tree.of([-1, 0, 0, 1, 2])
    p = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.3, 0.3], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    guesses = Guesses(tree, torch.tensor([[2, 0, 1, 0, 0]]), torch.tensor([[False, True, True, True, True]]))
    path, kept, following = module._typical(guesses, p.log()[None], target=GIVEN, temperature=1.0, epsilon=0.09)
    assert (path.tolist(), kept.tolist(), following.tolist()) == ([[0, 1, 3]], [2], [2])


def test_plausible_by_hand():
    """Oracle: by hand: a sure model asks for epsilon, one that is torn between n tokens for 0.3 / n."""
    for n in (1, 2, 10):
        p = torch.cat((torch.full((n,), 1 / n), torch.zeros(3)))
        assert typical(p, 0.09).item() == pytest.approx(min(0.09, 0.3 / n), rel=2e-4)


# Whole texts


def test_greedy_tokens_are_those_of_generate(target):
    """Oracle: `generate`, alone and in a padded batch, with a stop token inside; heads as they begin, which are often wrong."""
    heads, method = MedusaHeads(target, 3), Medusa()
    heads.paths = likeliest_paths(torch.tensor([[0.5, 0.3, 0.1]] * 3), 12)
    tokens, padding = pad(PROMPTS)
    whole = generate(target, tokens, 23, padding=padding)
    for stop in ((), {int(whole[0, 4]), int(whole[1, 7])}):
        decoded = method.decode(target, tokens, 23, draft=heads, padding=padding, stop=stop)
        assert torch.equal(decoded.tokens, generate(target, tokens, 23, padding=padding, stop=stop))
    assert torch.equal(method.decode(target, tokens[:1], 23, draft=heads).tokens[0], whole[0])


def test_texts_have_the_targets_chances_where_acceptance_is_exact(generator, claim):
    """Oracle: the chance of each of 64 texts, by the whole forward; a chi-square over 10,000 draws. Control: typical acceptance."""
    target, worst = tiny(generator), 1.0
    heads = MedusaHeads(target, 2)
    heads.paths = [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    tokens = torch.tensor([[1, 3]]).expand(10_000, 2)
    for temperature in (1.0, 0.6, 1.7):
        expected = chances(target, [1, 3], 3, temperature)
        given = {"draft": heads, "temperature": temperature, "generator": generator}
        exact, plausible = (
            Medusa(acceptance=kind).decode(target, tokens[:rows], 3, **given).tokens
            for kind, rows in (("exact", 10_000), ("typical", 100))  # which makes no draws
        )
        worst = min(worst, p_value(number(exact, 4).bincount(minlength=64), expected))
        assert p_value(number(plausible, 4).bincount(minlength=64), expected) < 1e-9
    claim("medusa", "exact-scheme", worst)


@pytest.fixture(scope="module")
def tokens_a_call(chain):
    """Of the chain at temperature 1, over 32 texts of 100 tokens: with the tree, with its best branch alone, and typical."""
    target, _, heads = chain
    branch = MedusaHeads(target, 3)
    branch.load_state_dict(heads.state_dict())  # its tree is the chain of best guesses

    def count(draft, acceptance):
        decoded = Medusa(acceptance=acceptance).decode(
            target, torch.zeros(32, 1, dtype=torch.int64), 100, draft=draft, temperature=1.0,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        return 3200 / int(decoded.rounds.sum())

    return {"tree": count(heads, "exact"), "branch": count(branch, "exact"), "typical": count(heads, "typical")}


def test_heads_spare_calls(tokens_a_call, claim):
    """Oracle: calls are counted; plain decoding gives one token a call."""
    claim("medusa", "fewer-calls", tokens_a_call["tree"])


def test_heads_spare_calls_on_text(heads_of_testbed, claim):
    """Oracle: plain decoding gives one token a call, and the same text."""
    model, prompts = unseen_text()
    decoded = Medusa().decode(model, prompts, 32, draft=heads_of_testbed)
    assert torch.equal(decoded.tokens, generate(model, prompts, 32))
    assert decoded.draft_calls == decoded.target_calls - 1  # heads guess in each round but the first
    claim("medusa", "fewer-calls-on-the-testbed", decoded.tokens.numel() / int(decoded.rounds.sum()))


def test_a_tree_spares_more_than_a_branch(tokens_a_call, claim):
    """Oracle: calls of the same heads with their best guesses alone."""
    claim("medusa", "tree", tokens_a_call["tree"] / tokens_a_call["branch"])


def test_typical_acceptance_keeps_more(tokens_a_call, claim):
    """Oracle: calls of the same heads and tree under the exact scheme."""
    claim("medusa", "typical-keeps-more", tokens_a_call["typical"] / tokens_a_call["tree"])


def departure(tokens, prompts, model, temperature):
    """Total variation between the chances of each token where it is certain, and where the model draws it: `[batch, n]`."""
    with torch.no_grad():
        logits = model(torch.cat((prompts, tokens), dim=1))[:, prompts.shape[1] - 1 : -1]
    p = (logits / temperature).softmax(dim=-1)
    return (torch.nn.functional.one_hot(tokens, p.shape[-1]) - p).abs().sum(dim=-1) / 2


def test_how_far_typical_acceptance_leaves_the_models_distribution(heads_of_testbed, claim):
    """Oracle: the definition of total variation: a text that takes no draw has at each place one token of chance 1, at temperature 1.

    Controls: another seed gives the same text; at a temperature where the model itself is nearly certain there is little to leave.
    """
    model, prompts = unseen_text()

    def write(temperature, seed):
        seeded = torch.Generator().manual_seed(seed)
        given = {"draft": heads_of_testbed, "temperature": temperature, "generator": seeded}
        return Medusa().decode(model, prompts, 20, **given).tokens

    text = write(1.0, 0)
    assert torch.equal(write(1.0, 1), text)
    far = float(departure(text, prompts, model, 1.0).mean())
    assert departure(write(0.02, 0), prompts, model, 0.02).mean() < far / 4
    claim("medusa", "typical-leaves-the-distribution", far)


# Arguments


def test_heads_of_another_target_are_refused(target, generator):
    for draft in (None, target, MedusaHeads(tiny(generator), 2)):
        with pytest.raises(ValueError, match=r"must be heads for a target of \(61, 32\)"):
            Medusa().decode(target, torch.tensor([[5]]), 3, draft=draft)


def test_too_short_a_text_is_refused(target, generator):
    with pytest.raises(ValueError, match="a text of 60 tokens has no window of length=68"):
        Medusa().prepare(target, None, torch.zeros(60, dtype=torch.int64), generator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 0}, "heads=0"), ({"nodes": 0}, "nodes=0"), ({"steps": 0}, "steps=0"), ({"epsilon": 0.0}, "epsilon=0.0"), ({"acceptance": "greedy"}, "acceptance='greedy'")],
)  # fmt: skip
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Medusa(**settings)
