"""What the testbed is for: it does its tasks, and does them by reading the whole text."""

import pytest
import torch

from refimpl import testbed
from refimpl.testbed.evaluate import CUT

LENGTH, SAMPLES = 1024, 40
# The least score, and the least distance from a guess and from the same model shown the end only. Of the examples of few_shot some stand in
# that end. Summaries tell notes twice or leave one out, since the next one in the text has to be found by its place: see the card.
PROMISES = {
    "single_doc_qa": (0.95, 0.7),
    "multi_doc_qa": (0.95, 0.7),
    "few_shot": (0.95, 0.2),
    "needle": (0.95, 0.7),
    "code_completion": (0.9, 0.5),
    "retrieval": (0.95, 0.7),
    "summarization": (0.5, 0.35),
}


@pytest.fixture(scope="module")
def subject():
    return testbed.subject()


def scores(subject, name):
    """Score on held-out samples, that of the same model shown the end only, and that of a guess."""
    samples = testbed.tasks.samples(name, SAMPLES, LENGTH, torch.Generator().manual_seed(1))
    blind = testbed.tasks.blind_score(name, SAMPLES, LENGTH, torch.Generator().manual_seed(1))
    return subject.score(name, samples), subject.score(name, samples, last=CUT), blind


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISES)
def test_it_does_the_task_by_reading(subject, name):
    """Oracle: the samples' own answers, at the model's whole context; negative controls: a cut text, and a guess."""
    score, cut, blind = scores(subject, name)
    least, distance = PROMISES[name]
    assert score >= least
    assert score >= max(cut, blind) + distance


def test_every_task_is_promised():
    assert set(PROMISES) == set(testbed.tasks.NAMES)
