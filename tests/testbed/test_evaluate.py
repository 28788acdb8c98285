"""Evaluation: what stands in the card is what was measured, beside a guess and the same model without the text."""

import json

import pytest
import torch

from refimpl import testbed
from refimpl.testbed import evaluate


@pytest.fixture(scope="module")
def subject():
    return testbed.subject()


def test_scores_stand_beside_a_guess_and_a_cut_text(subject, monkeypatch):
    """Oracle: a model that answers from what it is shown: right if it sees the whole, wrong if only the end."""
    samples = {}

    def answers(self, prompts, n, last=None):
        name = next(name for name, drawn in samples.items() if drawn[0].prompt == prompts[0])
        return [sample.answer if last is None else "" for sample in samples[name]]

    for name in testbed.tasks.NAMES:
        samples[name] = testbed.tasks.samples(name, 2, 384, torch.Generator().manual_seed(0))
    monkeypatch.setattr(testbed.Subject, "answers", answers)
    found = evaluate.scores(subject, 2, 384)
    assert list(found) == list(testbed.tasks.NAMES)
    assert all(row["score"] == 1 and row["cut"] == 0 and 0 <= row["guess"] < 1 for row in found.values())


def test_the_card_says_what_was_measured(subject):
    """Oracle: figures made up here; the committed training log."""
    found = {"needle": {"score": 0.5, "guess": 0.0, "cut": 0.25}}
    text = evaluate.card(subject.model, found, 5.678, 9, 1024)
    assert "| needle | 0.50 | 0.00 | 0.25 |" in text
    assert "9 held-out samples" in text and "5.68" in text
    assert f"{sum(p.numel() for p in subject.model.parameters()):,} parameters" in text
    log = json.loads((testbed.CHECKPOINT / "training.json").read_text())["log"]
    stages = json.loads((testbed.CHECKPOINT / "training.json").read_text())["stages"]
    assert f"{log[-1]['step']:,} steps" in text
    assert sum(stage["steps"] for stage in stages) == log[-1]["step"]
    assert all(f"{stage['steps']:,} at length" in text for stage in stages)
