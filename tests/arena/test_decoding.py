"""The decoding arena: its figures, and that all methods meet the same target, draft and prompts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from refimpl.arena import decoding as arena
from refimpl.arena.protocol import Conditions
from refimpl.inference.decoding.protocol import Plain
from refimpl.inference.decoding.speculative.speculative_sampling import SpeculativeSampling
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

CONFIG = Config(
    vocabulary=61, d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, sliding_window=(9, None, None)
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny target on text that repeats, and a draft of few steps."""
    target = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.3).eval()
    text = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(1)).repeat(20)
    monkeypatch.setattr(
        arena.testbed, "subject", lambda path, device: SimpleNamespace(model=target, text=lambda split, n: text)
    )
    monkeypatch.setattr(arena, "_drafts", {})
    for name, value in {"PROMPT": 8, "NEW": 12, "PROMPTS": 4, "DRAFT_STEPS": 3, "QUICK_DRAFT_STEPS": 2}.items():
        monkeypatch.setattr(arena, name, value)


def conditions(seed=4, **given):
    return Conditions(torch.Generator().manual_seed(seed), **given)


@pytest.mark.parametrize("axes", [{}, {"temperature": 0.0, "batch": 4}, {"temperature": 1.0, "batch": 3}])
def test_figures_are_those_announced_and_repeat(axes):
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (arena.baseline, lambda given: arena.measure(SpeculativeSampling, {"gamma": 2}, given)):
        first, second = run(conditions(axes=axes)), run(conditions(axes=axes))
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]
        assert first["identical"] == 1


def test_plain_decoding_is_itself():
    """Oracle: by hand."""
    figures = arena.baseline(conditions())
    assert figures["target_calls_per_token"] == 1 and figures["accepted_share"] == 0
    assert figures["accepted_length"] == 0
    assert figures["expected_speedup"] == 1 and figures["speedup"] > 0


def test_a_draft_that_is_the_target_is_always_right(monkeypatch):
    """Oracle: by hand: gamma + 1 tokens a call: 12 tokens in 4 calls of 3; a draft's call costs what the target's does."""
    monkeypatch.setattr(arena, "draft_of", lambda target, text, conditions: target)
    seen = []
    monkeypatch.setattr(arena, "_costs", lambda *given: seen.append(given[-1]) or (1.0, {3: 1.0}))
    figures = arena.measure(SpeculativeSampling, {"gamma": 2}, conditions())
    assert figures["target_calls_per_token"] == pytest.approx(4 / 12)
    assert figures["accepted_length"] == 2 and figures["accepted_share"] == 1
    assert figures["expected_speedup"] == pytest.approx(1.0) and seen == [{3}]


def test_expected_speed_takes_the_time_of_each_call(monkeypatch):
    """Oracle: by hand. Guesses are right, so that 13 tokens come of calls over 6, 6 and 1, with 5, 5 and 0 guesses.

    They take 3, 3 and 1 times as long as one over one token, and 10 calls of the draft 0.1 each: 13 / 8.
    """
    monkeypatch.setattr(arena, "draft_of", lambda target, text, conditions: target)
    monkeypatch.setattr(arena, "_costs", lambda draft, target, prompts, widths: (0.1, {6: 3.0, 5: 9.0, 1: 1.0}))
    monkeypatch.setattr(arena, "NEW", 13)
    figures = arena.measure(SpeculativeSampling, {"gamma": 5}, conditions())
    assert figures["accepted_length"] == pytest.approx(10 / 3)
    assert figures["expected_speedup"] == pytest.approx(13 / 8)


def test_calls_are_timed_by_their_width(monkeypatch):
    """Oracle: by hand, with a clock that a call over w tokens moves by 3 + w, and a draft's by 1: 4 and 1, and 10 for seven tokens.

    Each call stands behind the prompt alone; one of nine that takes far longer changes nothing.
    """
    now, seen, slow = [0.0], [], iter([100.0])

    class Ticking:
        def __init__(self, of):
            self.of = of

        def __call__(self, tokens, cache):
            x = torch.zeros(len(tokens), 1, tokens.shape[1], 1)
            seen.append((tokens.shape[1], cache.length))
            cache.update(0, x, x, x, torch.arange(tokens.shape[1])[None])
            now[0] += self.of(tokens.shape[1])

    monkeypatch.setattr(arena, "clock", lambda device: now[0])
    target = Ticking(lambda width: 3 + width + (next(slow, 0.0) if width == 7 else 0.0))
    draft = SimpleNamespace(as_decoder=lambda given: Ticking(lambda width: 1) if given is target else None)
    cost, reading = arena._costs(draft, target, torch.zeros(2, 5, dtype=torch.int64), {7})
    assert cost == 0.25 and reading == {1: 1.0, 7: 2.5}
    assert sorted(set(seen)) == [(1, 5), (5, 0), (7, 5)]


def test_guesses_of_a_tree_count_along_its_longest_branch():
    """Oracle: by hand: 30 guesses of a row in branches of 12 together, of which 6 stand: a half, and half of one in each of 12 calls."""

    class Branching(Plain):
        def decode(self, target, tokens, n, **given):
            depths, stood = torch.ones(1, 12, dtype=torch.int64), torch.arange(12)[None] % 2
            counts = {"drafted": torch.tensor([30]), "depths": depths, "stood": stood}
            return replace(super().decode(target, tokens, n, **given), **counts)

    figures = arena.measure(Branching, {}, conditions())
    assert figures["accepted_share"] == 0.5 and figures["accepted_length"] == 0.5
    assert figures["expected_speedup"] == 1.5  # calls over one token, by this record


def test_wrong_text_is_seen():
    """Negative control of `identical`: a method that changes one token of one text of four."""

    class Careless(Plain):
        def decode(self, target, tokens, n, **given):
            decoded = super().decode(target, tokens, n, **given)
            decoded.tokens[0, 3] = (decoded.tokens[0, 3] + 1) % 61
            return decoded

    assert arena.measure(Careless, {}, conditions(axes={"batch": 4}))["identical"] == 0.75


def test_the_draft_is_the_first_layer_trained_once_and_without_touching_the_target():
    """Oracle: the target before; names and shapes of its first layer."""
    given = arena.testbed.subject(None, "cpu")
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    draft = arena.draft_of(given.model, given.text("train", 1000), conditions())
    assert arena.draft_of(given.model, given.text("train", 1000), conditions(seed=9)) is draft
    assert draft.config.n_layers == 1 and draft.config.sliding_window == (9,) and not draft.training
    after = draft.state_dict()
    assert {name: value.shape for name, value in after.items()} == {name: before[name].shape for name in after}
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


def test_quick_takes_fewer_prompts():
    """Oracle: calls of the method: one to warm up, one for each prompt."""
    calls = []

    class Counted(Plain):
        def decode(self, target, tokens, n, **given):
            calls.append(len(tokens))
            return super().decode(target, tokens, n, **given)

    arena.measure(Counted, {}, conditions(quick=True))
    assert calls == [1, 1, 1]
    arena.measure(Counted, {}, conditions())
    assert len(calls) == 3 + 5
