"""SpeculativeSampling: the rule against closed forms and transformers, whole texts against their exact chances."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.draft_and_verify import Draft
from refimpl.inference.decoding.speculative import speculative_sampling as module
from refimpl.inference.decoding.speculative.speculative_sampling import (
    SpeculativeSampling,
    accept_greedy,
    accept_sampled,
    acceptance,
    residual,
)
from refimpl.inference.decoding.speedup import expected_tokens, expected_tokens_of
from refimpl.model.config import Config
from refimpl.model.generate import generate, pad
from refimpl.model.load import save
from refimpl.model.model import Decoder, initialize_
from tests.inference.decoding.chances import FALSE_ALARM, chances, markov, number, p_value, same_source, tiny

ROWS = 10_000


def draw(target, draft, n=3, gamma=2, temperature=1.0, seed=1, prompt=(1, 3), rows=ROWS):
    """Counts of all texts of n tokens."""
    decoded = SpeculativeSampling(gamma=gamma).decode(
        target,
        torch.tensor([prompt]).expand(rows, -1),
        n,
        draft=draft,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    vocabulary = target.config.vocabulary
    return number(decoded.tokens, vocabulary).bincount(minlength=vocabulary**n)


# The rule


def distributions(generator, *shape):
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def test_the_rule_gives_the_targets_distribution_exactly(generator):
    """Oracle: theorem (Appendix A.1): summed over all guesses, accepted or replaced, a token has chance p. No draw is made.

    Negative controls: replaced from p, or always accepted, it has another.
    """
    p, q = distributions(generator, 200, 5), distributions(generator, 200, 5)
    keep = torch.minimum(torch.ones(()), p / q)
    rejected = (q * (1 - keep)).sum(-1, keepdim=True)
    assert_close(q * keep + rejected * residual(p, q), p)
    assert_close(1 - rejected.squeeze(-1), acceptance(p, q))
    assert (q * keep + rejected * p - p).abs().max() > 0.1
    assert (q - p).abs().max() > 0.1


def test_acceptance_is_one_minus_total_variation(generator):
    """Oracle: Definition 3.2 and Theorem 3.5: 1 - sum |p - q| / 2; 1 for equal distributions, 0 for disjoint ones."""
    p, q = distributions(generator, 50, 7), distributions(generator, 50, 7)
    assert_close(acceptance(p, q), 1 - (p - q).abs().sum(-1) / 2)
    assert_close(acceptance(p, p), torch.ones(50, dtype=torch.float64))
    assert acceptance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0


def test_residual_where_nothing_is_left():
    """Equal distributions never reject but by rounding; then the target's own distribution is what is left."""
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p, p), p)
    tiny_gap = torch.tensor([0.5 + 1e-7, 0.5 - 1e-7])
    assert_close(residual(tiny_gap, torch.tensor([0.5, 0.5])), torch.tensor([1.0, 0.0]))


def test_guesses_stand_up_to_the_first_that_does_not():
    """Oracle: by hand. Rows whose first mismatch is at 0, 2, nowhere, and behind the guesses that were put."""
    best = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    logits = torch.nn.functional.one_hot(best, 6).float()
    tokens = torch.tensor([[0, 2, 3], [1, 2, 0], [1, 2, 3], [1, 2, 3]])
    kept, following = accept_greedy(Draft(tokens, torch.tensor([3, 3, 3, 1])), logits)
    assert kept.tolist() == [0, 2, 3, 1] and following.tolist() == [1, 3, 4, 2]


def test_one_decision_is_that_of_transformers(generator, monkeypatch):
    """Peer: transformers 5.23.0, `_speculative_sampling`, one row at a time, given the same uniform numbers; the likeliest
    token stands for the draw of the replacement in both."""
    from transformers.generation.utils import _speculative_sampling

    rows, gamma, vocabulary = 100, 3, 7
    target, draft = (2 * torch.randn(rows, g, vocabulary, generator=generator) for g in (gamma + 1, gamma))
    q = draft.softmax(-1)
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(rows, gamma)
    uniform = torch.rand(rows, gamma, generator=generator)
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kwargs: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: uniform)
    kept, following = accept_sampled(
        Draft(tokens, torch.full((rows,), gamma), q), target, temperature=1.0, generator=None
    )
    monkeypatch.undo()
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: p.argmax(-1, keepdim=True))
    for row in range(rows):
        monkeypatch.setattr(torch, "rand_like", lambda x, row=row: uniform[row].view_as(x))
        one = slice(row, row + 1)
        theirs, matches = _speculative_sampling(tokens[one], draft[one], gamma, target[one])
        assert int(matches) == kept[row]
        assert theirs[0].tolist() == [*tokens[row, : kept[row]].tolist(), int(following[row])]
    assert len(set(kept.tolist())) == gamma + 1  # control: every outcome occurred


def test_draws_are_distributed_as_those_of_transformers(generator):
    """Peer: transformers 5.23.0, `_speculative_sampling`, 2,000 decisions against as many of ours; false alarm 1e-4."""
    from transformers.generation.utils import _speculative_sampling

    draws, gamma = 2000, 2
    target, draft = (1.5 * torch.randn(1, g, 4, generator=generator) for g in (gamma + 1, gamma))
    q = draft.softmax(-1).expand(draws, -1, -1)
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(draws, gamma)
    kept, following = accept_sampled(
        Draft(tokens, torch.full((draws,), gamma), q),
        target.expand(draws, -1, -1),
        temperature=1.0,
        generator=generator,
    )
    ours, theirs = kept * 4 + following, []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for row in tokens:
            found, matches = _speculative_sampling(row[None], draft, gamma, target)
            theirs.append(int(matches) * 4 + int(found[0, -1]))
    assert same_source(*(torch.as_tensor(x).bincount(minlength=12) for x in (ours, theirs))) > FALSE_ALARM


def test_certain_guesses_count_as_one_hot(generator):
    """Oracle: the rule for a distribution that puts all on the guess: kept with chance p(x), else drawn from p without x."""
    logits = torch.tensor([[[0.3, 1.2, -0.5], [0.0, 0.0, 0.0]]]).expand(30_000, 2, 3)
    draft = Draft(torch.ones(30_000, 1, dtype=torch.int64), torch.ones(30_000, dtype=torch.int64))
    kept, following = accept_sampled(draft, logits, temperature=1.0, generator=generator)
    p = logits[0, 0].softmax(-1)
    assert p_value(torch.stack(((kept == 0).sum(), kept.sum())), torch.stack((1 - p[1], p[1]))) > FALSE_ALARM
    replaced = following[kept == 0].bincount(minlength=3)
    assert replaced[1] == 0
    assert p_value(replaced[[0, 2]], p[[0, 2]] / (p[0] + p[2])) > FALSE_ALARM


# Whole texts


def test_texts_have_the_targets_chances(generator, claim):
    """Oracle: the chance of each of 64 texts, by the whole forward over all of them; a chi-square over 10,000 draws.

    Two-layer models that disagree; guesses beyond what is left to decode, temperatures on both sides of 1; rows part all the
    time. False alarm 1e-4 each.
    """
    target, draft = tiny(generator), tiny(generator, n_layers=1)
    worst = 1.0
    for gamma, temperature in ((1, 1.0), (2, 1.0), (5, 1.0), (2, 0.6), (2, 1.7)):
        found = p_value(
            draw(target, draft, gamma=gamma, temperature=temperature), chances(target, [1, 3], 3, temperature)
        )
        worst = min(worst, found)
    claim("speculative-sampling", "exact-distribution", worst)
    assert p_value(draw(target, draft), chances(draft, [1, 3], 3, 1.0)) < 1e-9  # control: it is not the draft's


def always(draft, logits, *, temperature, generator):
    """Wrong: every guess stands."""
    p = (logits / temperature).softmax(-1)
    last = p[torch.arange(len(p)), draft.counts]
    return draft.counts, torch.multinomial(last, 1, generator=generator).squeeze(1)


def from_target(draft, logits, *, temperature, generator):
    """Wrong: a guess is replaced by a draw from p instead of from what q lacks of it."""
    kept, _ = accept_sampled(draft, logits, temperature=temperature, generator=generator)
    p = (logits / temperature).softmax(-1)[torch.arange(len(kept)), kept]
    return kept, torch.multinomial(p, 1, generator=generator).squeeze(1)


def no_temperature(draft, logits, *, temperature, generator):
    """Wrong: the target is read at temperature 1."""
    return accept_sampled(draft, logits, temperature=1.0, generator=generator)


@pytest.mark.parametrize("rule", [always, from_target, no_temperature])
def test_a_wrong_rule_is_found_out(generator, monkeypatch, rule):
    """Negative control of the test above: the same draws, judged in the same way, by rules that are plausible and wrong."""
    target, draft = tiny(generator), tiny(generator, n_layers=1)
    monkeypatch.setattr(module, "accept_sampled", rule)
    assert p_value(draw(target, draft, temperature=0.6), chances(target, [1, 3], 3, 0.6)) < 1e-9


def test_draws_of_a_padded_batch_keep_to_their_rows(generator):
    """Oracle: exact chances of each prompt's continuation; two prompts of different length side by side."""
    target, draft = tiny(generator), tiny(generator, n_layers=1)
    prompts = [[1, 3, 0, 2], [2]]
    tokens, padding = (x.repeat(5_000, *[1] * (x.ndim - 1)) for x in pad(prompts))
    decoded = SpeculativeSampling(gamma=3).decode(
        target, tokens, 3, draft=draft, temperature=1.0, generator=generator, padding=padding
    )
    for i, prompt in enumerate(prompts):
        counts = number(decoded.tokens[i::2], 4).bincount(minlength=64)
        assert p_value(counts, chances(target, prompt, 3, 1.0)) > FALSE_ALARM


def test_texts_that_a_stop_token_ends_have_their_chances(generator):
    """Oracle: exact chances, texts that agree up to a stop token 0 taken together; drafts end early at it."""
    target, draft = tiny(generator), tiny(generator, n_layers=1)
    tokens = torch.tensor([[1, 3]]).expand(ROWS, 2)
    decoded = SpeculativeSampling(gamma=3).decode(
        target, tokens, 3, draft=draft, temperature=1.0, generator=generator, stop={0}
    )
    ends = torch.tensor([number(torch.tensor([_ended([i // 16, i // 4 % 4, i % 4])]), 4) for i in range(64)])
    expected = torch.zeros(64, dtype=torch.float64).index_add(0, ends, chances(target, [1, 3], 3, 1.0))
    assert p_value(number(decoded.tokens, 4).bincount(minlength=64), expected) > FALSE_ALARM


def _ended(text):
    return text if 0 not in text else text[: text.index(0)] + [0] * (3 - text.index(0))


def test_a_markov_chain_keeps_its_steps(generator):
    """Oracle: closed form: the product of the chain's chances; the draft is another chain."""
    table, other = (distributions(generator, 3, 3).float() for _ in range(2))
    counts = draw(markov(table), markov(other), n=4, gamma=3, prompt=(2,))
    steps = [(table[2, a] * table[a, b] * table[b, c] * table[c, d]) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]  # fmt: skip
    assert p_value(counts, torch.stack(steps)) > FALSE_ALARM


def test_beside_transformers(peer, generator, tmp_path):
    """Peer: transformers 5.23.0, `generate` with an assistant, greedy, on the same two checkpoints; tokens are the same.

    The draft is the target with noise on its weights, so that some guesses stand and some do not.
    """
    from transformers import AutoModelForCausalLM

    sizes = {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "d_ff": 256}
    target = initialize_(Decoder(Config(vocabulary=512, **sizes)), generator, std=0.1)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator))
    theirs = []
    for name, model in (("target", target), ("draft", draft)):
        save(model, tmp_path / name)
        theirs.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    settings = theirs[1].generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 4, "constant"
    settings.assistant_confidence_threshold = 0.0
    prompt, method = torch.randint(0, 512, (1, 16), generator=generator), SpeculativeSampling(gamma=4)
    acceptance = method.decode(target, prompt, 32, draft=draft).acceptance
    assert 0.2 < acceptance < 0.95

    def assisted():
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 32, "do_sample": False}
        return theirs[0].generate(prompt, assistant_model=theirs[1], **options)[:, 16:]

    peer(
        "speculative-sampling",
        "transformers",
        f"32 greedy tokens, four layers of width 128, 4 guesses a round, of which {acceptance:.0%} stand",
        lambda: method.decode(target, prompt, 32, draft=draft).tokens,
        assisted,
        within=0,
    )


# How many tokens a call gives


def pair(alpha, vocabulary=8):
    """Two decoders, of fixed distributions that overlap by alpha."""
    p = torch.full((vocabulary,), 1 / vocabulary)
    q = p.clone()
    q[0] += 1 - alpha
    q[1:] -= (1 - alpha) / (vocabulary - 1)
    assert (q > 0).all() and math.isclose(float(acceptance(p, q)), alpha, rel_tol=1e-5)
    return markov(p.expand(vocabulary, -1)), markov(q.expand(vocabulary, -1))


@pytest.fixture(scope="module")
def table_1():
    """64 texts of 600 tokens, alpha 0.8, gamma 5: a row of the paper's Table 1."""
    target, draft = pair(0.8)
    tokens = torch.zeros(64, 1, dtype=torch.int64)
    seeded = torch.Generator().manual_seed(0)
    return SpeculativeSampling(gamma=5).decode(target, tokens, 600, draft=draft, temperature=1.0, generator=seeded)


def test_tokens_a_call(table_1, claim):
    """Oracle: closed form, Eq. (1) at alpha 0.8 and gamma 5, on models that were made to have this alpha: 3.69."""
    claim("speculative-sampling", "tokens-per-call", 64 * 600 / int(table_1.rounds.sum()))


def test_operations_grow(table_1, claim):
    """Oracle: Table 1: positions that the target computes for each token it gives, where the draft costs nothing: 1.63."""
    claim("speculative-sampling", "more-operations", int((table_1.rounds + table_1.drafted).sum()) / (64 * 600))


def test_acceptance_is_what_the_distributions_share(table_1, claim):
    """Oracle: Corollary 3.6: the overlap of the two distributions, 0.8 by construction."""
    claim("speculative-sampling", "acceptance-is-overlap", table_1.acceptance)
    assert int(table_1.accepted.sum() + table_1.rejected.sum()) > 25_000


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 1), (0.5, 4), (0.9, 2)])
def test_tokens_a_call_follow_the_formula(alpha, gamma):
    """Oracle: closed form, Eq. (1), to 3 %: four standard errors of 20,000 tokens and the last round's missing guesses."""
    target, draft = pair(alpha)
    decoded = SpeculativeSampling(gamma=gamma).decode(
        target, torch.zeros(200, 1, dtype=torch.int64), 100, draft=draft, temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert 200 * 100 / int(decoded.rounds.sum()) == pytest.approx(expected_tokens(alpha, gamma), rel=0.03)
    assert expected_tokens_of([decoded]) == pytest.approx(
        100 / decoded.target_calls, rel=0.01
    )  # rows that ended are idle


def test_temperature_sharpens_both(generator):
    """Oracle: at temperature 2 the distributions are p^(1/2) and q^(1/2), normalized: their overlap is the acceptance."""
    target, draft = pair(0.5)
    decoded = SpeculativeSampling(gamma=1).decode(
        target, torch.zeros(256, 1, dtype=torch.int64), 50, draft=draft, temperature=2.0, generator=generator
    )
    p, q = (torch.softmax(m.lm_head.weight[:, 0].detach() * 8**0.5 / 2, -1) for m in (target, draft))
    assert decoded.acceptance == pytest.approx(float(acceptance(p, q)), abs=0.02)
    assert float(acceptance(p, q)) > 0.6  # control: not the 0.5 of temperature 1


def test_calls_of_both_models_by_hand(target):
    """Oracle: by hand. The target as its own draft: 5 tokens a round of 4 guesses; the last round of 11 has room for none."""
    decoded = SpeculativeSampling(gamma=4).decode(target, torch.tensor([[5, 7]]), 11, draft=target)
    assert decoded.target_calls == 3 and decoded.draft_calls == 8
    assert decoded.drafted.tolist() == [8] and decoded.accepted.tolist() == [8] and decoded.rejected.tolist() == [0]


def test_a_draft_ends_at_a_stop_token(target):
    """Oracle: by hand: the second token stops, so that two of nine guesses are made, in one round."""
    prompt = torch.tensor([[5, 7]])
    follows = generate(target, prompt, 9)[0].tolist()
    at = next(i for i in range(1, 9) if follows[i] not in follows[:i])
    decoded = SpeculativeSampling(gamma=9).decode(target, prompt, 20, draft=target, stop={follows[at]})
    assert decoded.draft_calls == at + 1 and decoded.drafted.tolist() == [at + 1]
    assert decoded.tokens.tolist() == [follows[: at + 1]] and decoded.target_calls == 1


# Arguments


def test_a_draft_that_does_not_fit_is_refused(target):
    other = Decoder(Config(vocabulary=60, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16))
    for draft, message in ((other, "vocabulary has 60 tokens and the target's 61"), (None, "draft=NoneType must be"), (torch.nn.Linear(2, 2), "draft=Linear must be")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SpeculativeSampling().decode(target, torch.tensor([[5]]), 3, draft=draft)


@pytest.mark.parametrize("gamma", [0, -1])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match=f"gamma={gamma}"):
        SpeculativeSampling(gamma=gamma)
