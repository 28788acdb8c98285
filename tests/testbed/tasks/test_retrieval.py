"""Retrieval: the passage of that number begins with the answer."""

import re

from refimpl.testbed import tasks


def test_the_answer_is_the_first_line_of_that_passage(generator):
    """Oracle: a regular expression over the text."""
    for sample in tasks.samples("retrieval", 20, 1024, generator):
        first = {int(number): line for number, line in re.findall(r"^Passage (\d+): (.*)$", sample.context, re.M)}
        assert list(first) == list(range(1, len(first) + 1))
        assert len(first) >= 2
        for question, answer in ((sample.question, sample.answer), *sample.more):
            number = int(re.fullmatch(r"Question: How does passage (\d+) begin\?\nAnswer: Passage \1:", question)[1])
            assert answer == f" {first[number]}"


def test_answers_are_spread_over_the_passages(generator):
    questions = {sample.question for sample in tasks.samples("retrieval", 60, 1024, generator)}
    assert len(questions) > 8
