"""SelfSpeculative: guesses against a loop written out, the threshold by hand, draws against exact chances, the search."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.decoding.speculative import self_speculative as module
from refimpl.inference.decoding.speculative.self_speculative import SelfSpeculative, adapt
from refimpl.inference.decoding.speculative.thinned import Thinned
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from tests.inference.decoding.chances import chances, number, p_value, tiny
from tests.inference.decoding.speculative.test_thinned import silenced
from tests.inference.decoding.unseen import unseen_text

IDLE = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]])  # sub-layers that hardly matter


def half_idle(generator, left):
    """Four layers that are sure of what they say; of the idle half of the sub-layers, a share `left` of the output remains."""
    sizes = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(vocabulary=61, **sizes)), generator, std=0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for block, (attention, feed_forward) in zip(model.layers, IDLE.T.tolist(), strict=True):
            block.attention.o_proj.weight.mul_(left if attention else 1)
            block.feed_forward.down_proj.weight.mul_(left if feed_forward else 1)
    return model


# A round


@torch.no_grad()
def by_hand(target, skipped, text, n, most, threshold):
    """Tokens, target calls, guesses and those accepted, one round after the other; a draft reads on where the target stopped."""
    draft, start = silenced(target, skipped), len(text)
    text = [*text, int(target(torch.tensor([text]))[0, -1].argmax())]
    calls, drafted, accepted = 1, 0, 0
    while len(text) < start + n:
        cache, guesses = FullCache(), []
        target(torch.tensor([text[:-1]]), cache)
        while len(guesses) < min(most, start + n - len(text) - 1):
            sure, guess = draft(torch.tensor([[*text, *guesses][-1:]]), cache)[0, -1].softmax(-1).max(-1)
            guesses.append(int(guess))
            if sure < threshold:
                break
        best = target(torch.tensor([[*text, *guesses]]))[0, len(text) - 1 :].argmax(-1).tolist()
        stand = next((i for i, guess in enumerate(guesses) if guess != best[i]), len(guesses))
        text += best[: stand + 1]
        calls, drafted, accepted = calls + 1, drafted + len(guesses), accepted + stand
    return text[start:], calls, drafted, accepted


@pytest.mark.parametrize(("most", "threshold"), [(12, 0.5), (3, 0.0), (5, 1.0)])
def test_rounds_are_those_of_a_loop_written_out(generator, most, threshold):
    """Oracle: whole forwards, and a copy of the target whose skipped sub-layers give 0, in a cache that the target filled."""
    target, prompt = half_idle(generator, 0.03), [5, 7, 33, 2]
    method = SelfSpeculative(guesses=most, threshold=threshold, goal=None)
    decoded = method.decode(target, torch.tensor([prompt]), 25, draft=Thinned(target, IDLE))
    found = decoded.tokens[0].tolist(), decoded.target_calls, int(decoded.drafted), int(decoded.accepted)
    assert found == by_hand(target, IDLE, prompt, 25, most, threshold)
    assert decoded.draft_calls == int(decoded.drafted)
    one_a_round = int(decoded.drafted) < decoded.target_calls  # control: the threshold matters
    assert one_a_round == (threshold == 1.0)


# The threshold


def test_a_threshold_by_hand():
    """Oracle: by hand, from the formulas. Half, all and none of 4 guesses accepted, all of the most, and no guess at all.

    Shares: 0.5 * 1 + 0.5 * a = 0.75, 1, 0.5, 1; the goal is 0.9, so that the threshold moves by 0.1 * 0.01 up, down, up, not.
    """
    threshold, share = adapt(
        torch.full((5,), 0.6), torch.ones(5), torch.tensor([2, 4, 0, 12, 0]), torch.tensor([4, 4, 4, 12, 0]), 12, 0.9
    )
    assert_close(threshold, torch.tensor([0.601, 0.599, 0.601, 0.6, 0.6]))
    assert_close(share, torch.tensor([0.75, 1.0, 0.5, 1.0, 1.0]))


def test_the_threshold_hears_of_every_round(generator, monkeypatch):
    """Oracle: the counts that are returned: what the threshold was told, and the last round, which has none after it; 0.6 and 0 at first."""
    told, moved = [], [(torch.tensor([0.6]), torch.tensor([0.0]))]

    def spy(threshold, share, accepted, drafted, most, goal):
        assert (threshold, share) == moved[-1]
        told.append((accepted, drafted))
        moved.append(adapt(threshold, share, accepted, drafted, most, goal))
        return moved[-1]

    monkeypatch.setattr(module, "adapt", spy)
    target = half_idle(generator, 0.03)
    decoded = SelfSpeculative().decode(target, torch.tensor([[5, 7, 33, 2]]), 25, draft=Thinned(target, IDLE))
    assert len(told) == decoded.target_calls - 2  # neither the prompt's call nor the last
    assert all(0 <= int(accepted) <= int(drafted) for accepted, drafted in told)
    last = int(decoded.drafted) - sum(int(drafted) for _, drafted in told)
    assert 0 <= int(decoded.accepted) - sum(int(accepted) for accepted, _ in told) <= last <= 12


def test_an_unsure_draft_ends(generator, claim):
    """Oracle: by construction: half of the layers say nearly what all say; guesses that were made in vain, with and without."""
    target = half_idle(generator, 0.03)
    tokens, draft = torch.randint(0, 61, (4, 8), generator=generator), Thinned(target, IDLE)
    settings = {}, {"threshold": 0.0, "goal": None}
    adaptive, fixed = (SelfSpeculative(**given).decode(target, tokens, 48, draft=draft) for given in settings)
    assert torch.equal(adaptive.tokens, fixed.tokens)
    claim("self-speculative", "unsure-drafts-end", vain(adaptive) / vain(fixed))


def test_how_sure_a_draft_is_does_not_depend_on_the_temperature(generator, monkeypatch):
    """Oracle: whole forwards of the target, which the draft equals, since what it leaves out is 0; only a last guess is unsure."""
    target, rounds = half_idle(generator, 0.0), []
    propose = module._UnsureDrafter.propose

    def spy(self, rows):
        rounds.append((rows.text[0, : int(rows.lengths)].clone(), propose(self, rows)))
        return rounds[-1][1]

    monkeypatch.setattr(module._UnsureDrafter, "propose", spy)
    given = {"draft": Thinned(target, IDLE), "temperature": 0.3, "generator": generator}
    SelfSpeculative(threshold=0.2, goal=None).decode(target, torch.tensor([[5, 7, 33, 2]]), 60, **given)
    ends = set()
    for text, draft in rounds[1:-1]:
        logits = target(torch.cat((text[None], draft.tokens), dim=1))[:, len(text) - 1 : -1]
        sure = logits.softmax(-1).gather(2, draft.tokens[..., None])[0, :, 0] >= 0.2
        assert sure[:-1].all() and (not sure[-1] or len(sure) == 12)
        ends.add(len(sure))
    assert len(ends) > 1


def test_rows_of_a_batch_have_their_own_thresholds(generator, monkeypatch):
    """Oracle: each prompt alone: the same rounds, and as many guesses; a threshold hears of no guess that there was no room for."""
    target, told = half_idle(generator, 0.03), torch.zeros(3)

    def spy(threshold, share, accepted, drafted, most, goal):
        told.add_(drafted)
        return adapt(threshold, share, accepted, drafted, most, goal)

    tokens, draft = torch.randint(0, 61, (3, 6), generator=generator), Thinned(target, IDLE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "adapt", spy)
        together = SelfSpeculative(guesses=5).decode(target, tokens, 30, draft=draft)
    assert (told <= together.drafted).all()
    for i in range(3):
        alone = SelfSpeculative(guesses=5).decode(target, tokens[i : i + 1], 30, draft=draft)
        for name in ("rounds", "drafted", "accepted", "rejected"):
            assert getattr(alone, name).item() == getattr(together, name)[i]
    assert len({*together.rounds.tolist()}) > 1  # control: they part


def vain(decoded):
    return int((decoded.drafted - decoded.accepted).sum())


# Whole texts


def test_texts_have_the_targets_chances(generator, claim):
    """Oracle: the chance of each of 64 texts, by the whole forward over all of them; a chi-square over 10,000 draws.

    Thresholds that never, sometimes and always end a draft; temperatures on both sides of 1; false alarm 1e-4 each.
    """
    target, worst = tiny(generator), 1.0
    draft = Thinned(target, torch.tensor([[1, 0], [0, 1]]))
    tokens = torch.tensor([[1, 3]]).expand(10_000, 2)
    for threshold, temperature in ((0.0, 1.0), (0.5, 0.6), (1.0, 1.7)):
        method = SelfSpeculative(guesses=3, threshold=threshold)
        decoded = method.decode(target, tokens, 3, draft=draft, temperature=temperature, generator=generator)
        counts = number(decoded.tokens, 4).bincount(minlength=64)
        worst = min(worst, p_value(counts, chances(target, [1, 3], 3, temperature)))
        assert (
            p_value(counts, chances(silenced(target, draft.skipped.long()), [1, 3], 3, temperature)) < 1e-9
        )  # control
    claim("self-speculative", "exact-distribution", worst)


def test_guesses_that_all_stand_would_be_found_out(generator, monkeypatch):
    """Negative control of the test above: the same draws, by a rule that keeps every guess."""
    target = tiny(generator)

    def always(draft, logits, *, temperature, generator):
        p = (logits / temperature).softmax(-1)[torch.arange(len(logits)), draft.counts]
        return draft.counts, torch.multinomial(p, 1, generator=generator).squeeze(1)

    monkeypatch.setattr(module, "accept_sampled", always)
    decoded = SelfSpeculative(guesses=3).decode(
        target, torch.tensor([[1, 3]]).expand(10_000, 2), 3, draft=Thinned(target, torch.tensor([[1, 0], [0, 1]])),
        temperature=1.0, generator=generator,
    )  # fmt: skip
    assert p_value(number(decoded.tokens, 4).bincount(minlength=64), chances(target, [1, 3], 3, 1.0)) < 1e-9


# The search


def test_the_search_finds_what_may_be_left_out(generator, claim):
    """Oracle: by construction, half of the sub-layers hardly matter; tokens for each reading of all weights, 1 for plain decoding.

    Found by 16 trials of 256 sets, and better than leaving out nothing, all, or those that matter. The first is nothing, so that a
    search that finds nothing better is no slower than plain decoding.
    """
    target = half_idle(generator, 0.005)
    method, text = SelfSpeculative(), torch.randint(0, 61, (600,), generator=generator)
    before = copy.deepcopy(target.state_dict())
    draft = method.prepare(target, None, text, generator)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    prompts = text[:60].view(4, 15)
    found = method._speed(target, draft, prompts)
    for skipped in (torch.zeros(2, 4), torch.ones(2, 4), 1 - IDLE):
        assert method._speed(target, Thinned(target, skipped), prompts) < found
    assert not SelfSpeculative(trials=1).prepare(target, None, text, generator).skipped.any()
    claim("self-speculative", "speed", found)
    owned = {id(parameter) for parameter in target.parameters()}
    extra = [parameter for parameter in draft.parameters() if id(parameter) not in owned]
    claim("self-speculative", "no-memory", sum(parameter.nbytes for parameter in extra))


def test_a_trained_model_has_little_to_spare(generator, claim):
    """Oracle: plain decoding gives one token for each reading of all weights; prompts are others than the search's."""
    (model, prompts), text = unseen_text(), testbed.corpus.tokens("train", 20_000)
    method = SelfSpeculative()
    draft = method.prepare(model, None, text, generator)
    decoded = method.decode(model, prompts, 32, draft=draft)
    assert torch.equal(decoded.tokens, generate(model, prompts, 32))
    cost = decoded.drafted * draft.cost + decoded.rounds
    claim("self-speculative", "speed-on-the-testbed", decoded.tokens.numel() / float(cost.sum()))


def test_cost_of_a_trial_by_hand(generator):
    """Oracle: by hand. Nothing left out, 3 guesses a round that all stand: 16 tokens are one, then rounds of 4, 4, 4, 3 tokens.

    Each guess and each of the 5 calls reads all weights once: 11 guesses and 5 calls for 16 tokens. Timed, it is positive.
    """
    target, prompts = half_idle(generator, 1.0), torch.tensor([[5, 7, 33, 2], [9, 1, 1, 4]])
    whole = Thinned(target, torch.zeros(2, 4))
    assert SelfSpeculative(guesses=3, threshold=0.0, goal=None)._speed(target, whole, prompts) == 1.0
    timed = SelfSpeculative(guesses=3, threshold=0.0, goal=None, measure="seconds")
    assert timed._speed(target, whole, prompts) > 0


def test_a_draft_of_another_target_is_refused(target):
    other = copy.deepcopy(target)
    for draft in (None, other, Thinned(other, torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="must be this target without some sub-layers"):
            SelfSpeculative().decode(target, torch.tensor([[5]]), 3, draft=draft)


def test_a_whole_target_as_its_draft_is_always_right(target):
    """Oracle: `generate`; by hand: one token, then 12 guesses and one more, then the last, for which there is no room to guess."""
    method, prompt = SelfSpeculative(threshold=0.0, goal=None), torch.tensor([[5, 7]])
    decoded = method.decode(target, prompt, 15, draft=Thinned(target, torch.zeros(2, 3)))
    assert torch.equal(decoded.tokens, generate(target, prompt, 15))
    assert decoded.target_calls == 3 and decoded.accepted.tolist() == decoded.drafted.tolist() == [12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guesses": 0}, "guesses=0 must be at least 1"),
        ({"trials": 0}, "trials=0"),
        ({"threshold": 1.5}, "threshold=1.5 is a share"),
        ({"goal": -0.1}, "goal=-0.1"),
        ({"measure": "flops"}, "measure='flops'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfSpeculative(**settings)


def test_too_short_a_text_is_refused(target, generator):
    with pytest.raises(ValueError, match="a text of 64 tokens is too short: it must have more than 64"):
        SelfSpeculative().prepare(target, None, torch.zeros(64, dtype=torch.int64), generator)
