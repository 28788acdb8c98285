"""Eagle: siblings in turn and whole texts against exact chances, tokens a call on real text, on a chain and beside Medusa."""

import pytest
import torch

from refimpl import testbed
from refimpl.inference.decoding.grow_and_verify import Guesses
from refimpl.inference.decoding.speculative import eagle as module
from refimpl.inference.decoding.speculative import feature_draft
from refimpl.inference.decoding.speculative.eagle import Eagle, accept_siblings
from refimpl.inference.decoding.speculative.feature_draft import FeatureDraft, train_draft
from refimpl.inference.decoding.speculative.feature_tree import Shape, distinct
from refimpl.inference.decoding.speculative.medusa import Medusa
from refimpl.inference.decoding.speculative.medusa_heads import MedusaHeads
from refimpl.model.generate import generate
from refimpl.model.train import windows
from tests.inference.decoding.chances import FALSE_ALARM, chances, number, p_value, tiny

# Siblings


def drawn(paths, p, q, generator, rows=20_000):
    """A tree of guesses in each row, drawn from q `[vocabulary]` at every node, and what the rule makes of it with p `[vocabulary]`.

    Returns:
        The first two tokens behind the root, and how many guesses stood; a third is drawn from p where two did.
    """
    shape = Shape(paths)
    tree, nodes = shape.upto(shape.depth), len(shape.paths)
    tokens, inner = torch.zeros(rows, nodes, dtype=torch.int64), []
    for place in range(nodes):
        children = (tree.parents == place).nonzero().flatten()
        if len(children):
            inner.append(place)
            tokens[:, children] = distinct(q.expand(rows, -1), len(children), generator)
    open_ = (torch.arange(nodes) > 0).expand(rows, -1)
    path, kept, following = accept_siblings(
        Guesses(tree, tokens, open_), p.expand(rows, nodes, -1), q.expand(rows, len(inner), -1), generator
    )
    taken = torch.cat((tokens.gather(1, path[:, 1:]), following[:, None]), dim=1).scatter(
        1, kept[:, None], following[:, None]
    )
    fresh = torch.multinomial(p.expand(rows, -1), 1, replacement=True, generator=generator)
    return torch.where(kept[:, None] == 0, torch.cat((taken[:, :1], fresh), dim=1), taken[:, :2]), kept


P, Q = torch.tensor([0.45, 0.05, 0.2, 0.0, 0.3]), torch.tensor([0.1, 0.6, 0.1, 0.2, 0.0])
SIBLINGS = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0)]


def test_tokens_have_the_targets_chances_whatever_was_guessed(generator):
    """Oracle: two tokens come with p(a) p(b); chi-square over 20,000 trees whose draft is far off, gives no chance to a token that is
    likely, and some to one that never comes. With as many siblings as there are tokens, most without a chance.
    """
    for paths in (SIBLINGS, [(i,) for i in range(5)] + [(0, 0)]):
        texts, kept = drawn(paths, P, Q, generator)
        assert p_value(number(texts, 5).bincount(minlength=25), torch.outer(P, P).flatten()) > FALSE_ALARM
        assert set(kept.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual", lambda p, q: p),  # p is not corrected where a guess is refused
        ("_without", lambda q, token: q),  # siblings are taken to be drawn from all of q
        ("_without", lambda q, token: q.scatter(1, token, 0.0)),  # and this is not normalized
    ],
)
def test_wrong_corrections_are_found_out(generator, monkeypatch, name, wrong):
    """Oracle: as above; negative controls."""
    monkeypatch.setattr(module, name, wrong)
    texts, _ = drawn(SIBLINGS, P, Q, generator)
    assert p_value(number(texts, 5).bincount(minlength=25), torch.outer(P, P).flatten()) < 1e-9


def test_chance_of_a_sibling_by_hand(generator):
    """Oracle: by hand: of q = (1/2, 1/2, 0) and p = (7, 1, 2) / 10. If the first guess is token 0, it stands. If it is token 1, it does
    with 1/5; else p' = (1/2, 0, 1/2) and q' = (1, 0, 0), and token 0 stands with 1/2. So none stands with 1/2 * 4/5 * 1/2.
    """
    _, kept = drawn([(0,), (1,)], torch.tensor([0.7, 0.1, 0.2]), torch.tensor([0.5, 0.5, 0.0]), generator, rows=40_000)
    assert p_value(kept.bincount(), torch.tensor([0.2, 0.8])) > FALSE_ALARM


def test_closed_guesses_do_not_stand(generator):
    """Oracle: by hand: with p = q all would stand; a row whose guesses are closed draws from p instead."""
    shape, p = Shape(SIBLINGS), torch.full((4, 7, 5), 0.2)
    tokens, open_ = torch.tensor([[0, 1, 2, 3, 4, 3, 1]]).expand(4, -1), torch.ones(4, 7, dtype=torch.bool)
    open_[:, 0], open_[1, 4:], open_[2] = False, False, False
    _, kept, _ = accept_siblings(Guesses(shape.upto(2), tokens, open_), p, p[:, :3], generator)
    assert kept.tolist() == [2, 1, 0, 2]


# Whole texts


def test_texts_have_the_targets_chances(generator, claim):
    """Oracle: the chance of each of 256 texts, by the whole forward; a chi-square over 10,000 draws, in rounds of one and two levels, with
    two siblings of four tokens, so that all may be refused. Control: another temperature.
    """
    target, worst = tiny(generator), 1.0
    method = Eagle(tree=((0,), (1,), (0, 0), (0, 1), (1, 0)), steps=20)
    draft = method.prepare(target, None, torch.randint(0, 4, (600,), generator=generator), generator)
    tokens = torch.tensor([[1, 3]]).expand(10_000, 2)
    for temperature in (1.0, 0.6, 1.7):
        decoded = method.decode(target, tokens, 4, draft=draft, temperature=temperature, generator=generator)
        counts = number(decoded.tokens, 4).bincount(minlength=256)
        worst = min(worst, p_value(counts, chances(target, [1, 3], 4, temperature)))
        assert p_value(counts, chances(target, [1, 3], 4, 0.7 * temperature)) < 1e-9
        assert 0.3 < decoded.acceptance < 0.95 and int(decoded.rounds.min()) == 2  # two guesses in one round
    claim("eagle", "exact", worst)


@pytest.fixture(scope="module")
def prompts():
    """Eight pieces of text that the testbed's model has not seen."""
    text = testbed.subject().text("held-out", 8_000)
    return text[torch.arange(8)[:, None] * 950 + torch.arange(64)]


@pytest.fixture(scope="module")
def tokens_a_call(prompts):
    """Greedy, 64 tokens of each text, by the testbed's model, with a layer as `prepare` makes it."""
    model = testbed.subject().model
    draft = Eagle().prepare(model, None, testbed.corpus.tokens("train", 20_000), torch.Generator().manual_seed(0))
    decoded = Eagle().decode(model, prompts, 64, draft=draft)
    assert torch.equal(decoded.tokens, generate(model, prompts, 64))
    return decoded.tokens.numel() / int(decoded.rounds.sum())


def test_calls_are_spared_on_text(tokens_a_call, claim):
    """Oracle: plain decoding gives one token a call, and the same text."""
    claim("eagle", "fewer-calls", tokens_a_call)


def test_more_calls_are_spared_than_by_heads(tokens_a_call, prompts, heads_of_testbed, claim):
    """Oracle: calls of Medusa with the likeliest 25 combinations of its heads."""
    model = testbed.subject().model
    heads = MedusaHeads(model, 4)
    heads.load_state_dict(heads_of_testbed.state_dict())
    heads.paths = heads_of_testbed.paths[: len(module.TREE)]
    decoded = Medusa().decode(model, prompts, 64, draft=heads)
    assert tokens_a_call > decoded.tokens.numel() / int(decoded.rounds.sum())
    claim("eagle", "beats-medusa", tokens_a_call / (decoded.tokens.numel() / int(decoded.rounds.sum())))


class FeaturesAlone(FeatureDraft):
    """The layer without a look at the tokens."""

    def forward(self, target, tokens, features, *rest):
        """As if all tokens were the first."""
        return super().forward(target, torch.zeros_like(tokens), features, *rest)


def test_tokens_beside_features_spare_calls_of_a_chain(chain, generator, monkeypatch, claim):
    """Oracle: calls are counted at temperature 1; a chain's next feature is that of the next token, which features alone do not know."""
    monkeypatch.setattr(feature_draft, "RATE", 0.03)  # for so small a layer
    target, _, _ = chain
    text = generate(target, torch.zeros(16, 1, dtype=torch.int64), 250, temperature=1.0, generator=generator).flatten()
    counts = []
    for kind in (FeatureDraft, FeaturesAlone):
        draft = kind(target, generator)
        train_draft(draft, target, windows(text, 4, 32, generator), 120, generator)
        decoded = Eagle().decode(
            target, torch.zeros(32, 1, dtype=torch.int64), 60, draft=draft, temperature=1.0, generator=generator
        )
        counts.append(32 * 60 / int(decoded.rounds.sum()))
    assert counts[0] > 4  # of 6 at most: guesses are nearly the target's own
    claim("eagle", "shifted-tokens-of-a-chain", counts[0] / counts[1])


# Arguments


def test_drafts_of_another_target_are_refused(target, generator):
    for draft in (None, target, FeatureDraft(tiny(generator), generator)):
        with pytest.raises(ValueError, match="must continue features of 32 entries"):
            Eagle().decode(target, torch.tensor([[5]]), 3, draft=draft)


def test_too_short_a_text_is_refused(target, generator):
    with pytest.raises(ValueError, match="a text of 60 tokens has no window of length=64"):
        Eagle().prepare(target, None, torch.zeros(60, dtype=torch.int64), generator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"tree": ()}, r"tree=\(\)"),
        ({"tree": [[0], [1, 0]]}, r"wrong: \[\(1, 0\)\]"),  # no parent
        ({"tree": [[1]]}, r"wrong: \[\(1,\)\]"),  # no elder sibling
        ({"tree": [[0], [0]]}, "twice the same"),
        ({"tree": [[0], []]}, r"wrong: \[\(\)\]"),
        ({"tree": [[-1]]}, r"wrong: \[\(-1,\)\]"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Eagle(**settings)
