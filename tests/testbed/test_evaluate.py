"""Evaluation: answers are generated, cut at the line's end, and scored by the task."""

import pytest
import torch

from refimpl import testbed
from refimpl.model.generate import generate
from refimpl.testbed import evaluate
from refimpl.testbed.tokenizer import tokenizer


@pytest.fixture(scope="module")
def model():
    return testbed.load()[0]


def test_answers_are_those_of_single_prompts(model, generator):
    """Oracle: `generate` on each prompt alone, without padding."""
    samples = testbed.tasks.samples("single_doc_qa", 3, 256, generator)
    samples += testbed.tasks.samples("few_shot", 2, 128, generator)
    prompts = [tokenizer().encode(sample.prompt).ids for sample in samples]
    alone = [tokenizer().decode(generate(model, torch.tensor([p]), 4)[0].tolist()).split("\n")[0] for p in prompts]
    assert evaluate.answers(model, prompts, 4, batch=2) == alone
    assert len({len(p) for p in prompts}) > 1


@pytest.mark.parametrize("name", ["single_doc_qa", "few_shot", "retrieval", "needle"])
def test_the_committed_model_solves_what_its_card_promises(model, name):
    """Oracle: the texts' own answers. 40 samples: a model of 95 % falls below 0.85 once in a thousand draws."""
    length = model.config.max_positions
    samples = testbed.tasks.samples(name, 40, length, torch.Generator().manual_seed(3))
    assert evaluate.score(model, name, samples) >= 0.85


@pytest.mark.parametrize("name", ["multi_doc_qa", "summarization", "code_completion"])
def test_the_committed_model_uses_the_whole_context(model, name):
    """Oracle: the same model shown the last 128 tokens only, and a guesser."""
    length = model.config.max_positions
    samples = testbed.tasks.samples(name, 30, length, torch.Generator().manual_seed(3))
    whole, cut = (evaluate.score(model, name, samples, limit) for limit in (None, evaluate.CUT))
    guess = testbed.tasks.blind_score(name, 30, length, torch.Generator().manual_seed(3))
    assert whole > max(cut, guess) + 0.25


def test_the_card_says_what_was_measured(model):
    found = {"needle": {"score": 0.5, "guess": 0.0, "cut": 0.25}}
    text = evaluate.card(model, found, 5.678, 9, 1024)
    assert "| needle | 0.50 | 0.00 | 0.25 |" in text
    assert "5.68" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
