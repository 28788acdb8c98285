"""Summarization: the notes, and nothing else, make the summary."""

import re

from refimpl.testbed import tasks


def test_the_summary_is_that_of_the_notes_in_their_order(generator):
    """Oracle: a regular expression over the text."""
    for sample in tasks.samples("summarization", 30, 512, generator):
        notes = re.findall(r"^Note from (\w+: \w+\.)$", sample.context, re.M)
        assert 3 <= len(notes) <= 7
        assert sample.answer == "".join(f" {note}" for note in notes)


def test_there_is_something_to_leave_out(generator):
    for sample in tasks.samples("summarization", 10, 512, generator):
        assert len(re.findall(r"^- \w+ (?:lives|works|has|likes) ", sample.context, re.M)) >= 3
