"""Retrieval: the line that is asked for stands in one passage, and that is the answer."""

import re

from refimpl.testbed import tasks


def test_the_line_stands_in_that_passage_only(generator):
    """Oracle: the text cut at its headings."""
    for sample in tasks.samples("retrieval", 20, 1024, generator):
        _, *parts = re.split(r"^Passage (\d+)\n", sample.context, flags=re.M)
        passages = dict(zip(map(int, parts[::2]), parts[1::2], strict=True))
        assert list(passages) == list(range(1, len(passages) + 1))
        assert len(passages) >= 2
        for question, answer in ((sample.question, sample.answer), *sample.more):
            line = re.search(r"has the line: (.*)\nAnswer:$", question)[1]
            where = [number for number, text in passages.items() if line in [x.strip() for x in text.splitlines()]]
            assert where == [int(answer)]


def test_answers_are_spread_over_the_passages(generator):
    answers = {sample.answer for sample in tasks.samples("retrieval", 60, 1024, generator)}
    assert len(answers) > 8
