"""What every task must satisfy. A solver that reads the text by rules stands in each task's own test."""

from random import Random

import pytest
import torch

from refimpl.testbed import tasks
from refimpl.testbed.sample import count

LENGTHS = (256, 512, 1024)


@pytest.fixture(params=tasks.NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("length", LENGTHS)
def test_samples_are_nearly_as_long_as_asked_and_never_longer(name, length, generator):
    """Oracle: the tokenizer's count of the whole text. A line of the text around takes up to some hundred tokens."""
    for sample in tasks.samples(name, 6, length, generator):
        turns = ((sample.question, sample.answer), *sample.more)
        size = count(sample.context) + sum(count(f"{q}{a}\n") for q, a in turns)
        assert 0.6 * length < size <= length


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(name):
    def draw(seed):
        return tasks.samples(name, 3, 256, torch.Generator().manual_seed(seed))

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_the_answer_scores_one_and_nothing_scores_less(name, generator):
    task = tasks.task(name)
    for sample in tasks.samples(name, 5, 512, generator):
        assert task.score(sample.answer, sample.answer) == 1
        assert task.score("", sample.answer) == 0


def test_answers_fit_into_their_tokens_with_the_line_break(name, generator):
    task = tasks.task(name)
    for sample in tasks.samples(name, 20, 512, generator):
        assert count(f"{sample.answer}\n") <= task.ANSWER_TOKENS


def test_question_and_answer_are_tokens_apart(name, generator):
    """A prompt's tokens are the beginning of those of the whole text: what was trained is what is asked."""
    for sample in tasks.samples(name, 5, 256, generator):
        assert count(sample.prompt) + count(f"{sample.answer}\n") == count(f"{sample.prompt}{sample.answer}\n")


def test_who_has_not_read_the_text_scores_low(name):
    """Oracle: chance, by counting values: 1/16 for one of 16; three parameters share characters."""
    score = tasks.blind_score(name, 200, 256, torch.Generator().manual_seed(0))
    assert score < {"code_completion": 0.45, "retrieval": 0.15, "summarization": 0.2}.get(name, 0.15)


def test_guesses_are_of_the_right_kind(name, generator):
    draw = Random(0)
    task = tasks.task(name)
    guesses = {task.guess(sample.question, draw) for sample in tasks.samples(name, 10, 256, generator)}
    assert len(guesses) > 2
    assert all(guess.strip() for guess in guesses)


def test_training_text_and_held_out_text_differ(name):
    def contexts(split):
        return tasks.samples(name, 2, 512, torch.Generator().manual_seed(0), split=split)

    assert contexts("train") != contexts("held-out")


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"unknown task 'needles'.*single_doc_qa"):
        tasks.task("needles")


def test_too_short_a_text_is_refused(name, generator):
    with pytest.raises(ValueError, match="too short"):
        tasks.samples(name, 20, 24, generator)
