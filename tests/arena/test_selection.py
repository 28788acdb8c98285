"""The arena of data selection: its corpus, its count model, and a selection that knows the sources."""

import math

import pytest
import torch

from refimpl.arena import selection as arena
from refimpl.arena.protocol import Conditions
from refimpl.data.selection.ngrams import words
from refimpl.data.selection.pretraining.dsir import DSIR

N = 12


def seeded(seed=4):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pieces, of as many documents: of fewer, a sample of ten would be no sample of its kind."""
    monkeypatch.setattr(arena, "QUICK_PIECES", N)
    monkeypatch.setattr(arena, "SAMPLE", 10)
    monkeypatch.setattr(arena, "FROM_ONE", {"code": 1, "prose": 1, "tasks": 8})


def conditions(target="prose"):
    return Conditions(generator=seeded(), axes={"target": target}, quick=True)


def test_count_model_by_hand():
    """Oracle: by hand. Trained on "a b a b", the pairs are ab, ba, ab; known are a, b, and all others as one more word."""
    after_a = 0.6 * 2 / 2 + 0.3 * 2 / 3 + 0.1 / 3
    other = 0.1 / 3
    assert arena.cross_entropy(["a b a b"], ["a b"], ["a b"]) == pytest.approx(-math.log(after_a))
    assert arena.cross_entropy(["a b a b"], ["a z"], ["a b"]) == pytest.approx(-math.log(other))
    assert arena.cross_entropy([], ["a b", "b"], ["a b"]) == pytest.approx(-math.log(other))


@pytest.mark.parametrize("target", ["prose", "code"])
def test_the_corpus_is_what_it_says(target):
    """Oracle: counting; no document serves the raw corpus, the sample and the measurement."""
    given = arena.substrate(target, seeded(), N)
    assert {name: given.sources.count(name) for name in given.sources} == dict.fromkeys(
        ("code", "prose", "tasks", "noise"), N
    )
    assert all(len(words(piece)) >= arena.WORDS for piece in given.raw + given.target + given.held_out)
    assert len(given.target) == len(given.held_out) == 10
    assert len({*given.raw, *given.target, *given.held_out}) == 4 * N + 20
    assert given == arena.substrate(target, seeded(), N) != arena.substrate(target, seeded(5), N)


def test_figures_are_those_announced_and_repeat():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (lambda: arena.baseline(conditions()), lambda: arena.measure(DSIR, {"smoothing": 0.0}, conditions())):
        first, second = run(), run()
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]


@pytest.mark.parametrize("target", ["prose", "code"])
def test_knowing_the_sources_beats_chance(target):
    """Oracle: a selection by label is right everywhere; chance is right in a quarter."""
    given = arena.substrate(target, seeded(), N)
    by_label = torch.tensor([i for i, source in enumerate(given.sources) if source == target])
    perfect = arena.figures(lambda *_: by_label, conditions(target))
    chance = arena.baseline(conditions(target))
    assert perfect["precision"] == 1 and 0 <= chance["precision"] < 0.6
    assert perfect["kl_reduction"] > chance["kl_reduction"]
    assert perfect["cross_entropy"] < chance["cross_entropy"]
