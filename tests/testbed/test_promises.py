"""What the testbed is for: it does its tasks, and does them by reading the whole text."""

import pytest
import torch

from refimpl import testbed
from refimpl.testbed.evaluate import CUT

LENGTH, SAMPLES = 1024, 40
SOLVED = ("single_doc_qa", "few_shot", "retrieval", "needle")
READ = ("multi_doc_qa", "summarization", "code_completion")


@pytest.fixture(scope="module")
def subject():
    return testbed.subject()


def scores(subject, name):
    """Score on held-out samples, that of the same model shown the end only, and that of a guess."""
    samples = testbed.tasks.samples(name, SAMPLES, LENGTH, torch.Generator().manual_seed(1))
    blind = testbed.tasks.blind_score(name, SAMPLES, LENGTH, torch.Generator().manual_seed(1))
    return subject.score(name, samples), subject.score(name, samples, last=CUT), blind


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVED)
def test_it_solves(subject, name):
    """Oracle: the samples' own answers, at the model's whole context; negative controls: a cut text, and a guess."""
    score, cut, blind = scores(subject, name)
    assert score >= 0.95
    assert max(cut, blind) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_it_reads(subject, name):
    """Oracle: the same model without the context, and a guess: a clear distance from both."""
    score, cut, blind = scores(subject, name)
    assert score > max(cut, blind) + 0.3
