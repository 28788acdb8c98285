"""The needle: a phrase of so many words, at the depth that was asked for."""

import re

import pytest

from refimpl.testbed import tasks


@pytest.mark.parametrize("words", [1, 7, 64])
def test_the_answer_is_the_phrase_word_by_word(words, generator):
    """Oracle: a regular expression over the text."""
    for sample in tasks.samples("needle", 5, 512, generator, words=words):
        name = re.search(r"pass phrase of (\w+)\?", sample.question)[1]
        (phrase,) = re.findall(rf"^The pass phrase of {name} is: (.*)$", sample.context, re.M)
        assert phrase == sample.answer.strip()
        assert sample.question.endswith(f"\nAnswer: The pass phrase of {name} is:")
        assert len(set(phrase.split())) == words  # no word twice: what follows a word is never in doubt


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_where_it_was_asked_for(depth, generator):
    """Oracle: characters before it over all, to within a line or two."""
    for sample in tasks.samples("needle", 5, 1024, generator, depth=depth):
        place = sample.context.index("The pass phrase") / len(sample.context)
        assert abs(place - depth) < 0.15


def test_depth_is_spread_if_it_is_not_given(generator):
    places = [s.context.index("The pass") / len(s.context) for s in tasks.samples("needle", 40, 512, generator)]
    assert min(places) < 0.2
    assert max(places) > 0.7


def test_further_needles_are_other_peoples(generator):
    (sample,) = tasks.samples("needle", 1, 512, generator, needles=3)
    questions = {sample.question, *(question for question, _ in sample.more)}
    assert len(questions) == 3
    assert sample.context.count("The pass phrase of") == 3
