"""Composing a sample: everything is told, in order, inside the length."""

from random import Random

import pytest

from refimpl.testbed import corpus
from refimpl.testbed.sample import ask, compose, count, passage

TOLD = ["one fish", "two fish\nof two lines", "red fish"]
TURNS = [(ask("how many?"), " two"), (ask("which?"), " red")]


@pytest.fixture(scope="module")
def filler():
    return corpus.lines("held-out", "code")


def test_told_lines_stand_whole_and_in_their_order(filler):
    for seed in range(20):
        sample = compose(TOLD, TURNS, 200, filler, Random(seed))
        places = [sample.context.index(f"{line}\n") for line in TOLD]
        assert places == sorted(places)


def test_the_first_question_is_the_samples(filler):
    sample = compose(TOLD, TURNS, 200, filler, Random(0))
    assert (sample.question, sample.answer, sample.more) == (*TURNS[0], (TURNS[1],))
    assert sample.prompt == sample.context + sample.question


def test_a_length_that_just_fits_leaves_no_room_for_more(filler):
    """Oracle: the tokenizer."""
    least = count("".join(f"{line}\n" for line in TOLD)) + sum(count(f"{q}{a}\n") for q, a in TURNS)
    assert compose(TOLD, TURNS, least, filler, Random(0)).context == "".join(f"{line}\n" for line in TOLD)
    with pytest.raises(ValueError, match=f"length={least - 1} tokens is too short.*takes {least}"):
        compose(TOLD, TURNS, least - 1, filler, Random(0))


@pytest.mark.parametrize("room", [0, 1, 50, 300])
def test_a_passage_is_as_long_as_whole_lines_allow(room, filler):
    """Oracle: the tokenizer, on the passage and on the passage with one line more."""
    for seed in range(10):
        lines = passage(filler, room, Random(seed))
        assert count("".join(lines)) <= room
        if lines:
            last = next(i for i in range(len(filler.lines)) if filler.lines[i : i + len(lines)] == lines) + len(lines)
            assert last == len(filler.lines) or count("".join(lines) + filler.lines[last]) > room
