"""What the rule keeps: by hand for each form, all that questions ask for, nothing of real text."""

import json
import re

import pytest
import torch

from refimpl.testbed import corpus, tasks
from refimpl.testbed import pairs as module
from refimpl.testbed.pairs import main, pairs, shortened, told


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("- Anna lives in Rome.", "Anna lives in Rome"),
        ("- Leo works as a baker.", "Leo works as a baker"),
        ("- Leo works for Anna.", "Leo works for Anna"),
        ("- Ida has a dog.", "Ida has a dog"),
        ("- Ida plays the harp.", "Ida plays the harp"),
        ("- cat => red", "cat => red"),
        ("Note from Karl: cake.", "Note from Karl : cake"),
        ("The pass phrase of Tom is: red cat load Rome", "The pass phrase of Tom is : red cat load Rome"),
        ("def load_file(size, mode):", "def load_file ( size , mode ):"),
    ],
)
def test_each_form_by_hand(line, short):
    """Oracle: by hand; the line's end stays, and lines around it go."""
    assert told(line)
    assert shortened(f"import os\n{line}\n    pass\nDocument 3\n") == short + "\n"


@pytest.mark.parametrize(
    "line", ["- Anna lives in Berne.", "- x lives in Rome.", "def load_file(self, path):", "Note from x", ""]
)
def test_lines_that_only_look_like_it(line):
    assert not told(line)


def test_passages_keep_their_first_lines():
    """Oracle: by hand. Other lines leave nothing."""
    lines = "import sysconfig\nfrom x import y\n"
    assert (
        shortened(f"Passage 1: {lines}Passage 2: a - b.\n{lines}")
        == "Passage 1 : import sysconfig\nPassage 2 : a - b .\n"
    )
    assert shortened(lines) == shortened("") == ""


def test_real_text_tells_nothing():
    """Oracle: the corpus, which nobody wrote for the tasks."""
    lines = corpus.lines("held-out").lines
    assert len(lines) > 1000 and [line for line in lines if told(line.rstrip("\n"))] == []


@pytest.mark.parametrize("name", tasks.NAMES)
def test_what_questions_ask_for_survives(name):
    """Oracle: the tasks' own answers to all their questions; the text gets much shorter."""
    for sample in tasks.samples(name, 4, 400, seeded()):
        short = shortened(sample.context)
        words = re.findall(r"\w+", short)
        for _, answer in [(sample.question, sample.answer), *sample.more]:
            assert set(re.findall(r"\w+", answer)) <= set(words)
        rest = iter(re.findall(r"\w+", sample.context))
        assert all(word in rest for word in words)  # in its order, nothing new
        assert len(words) < 0.7 * len(re.findall(r"\w+", sample.context))


def test_tasks_take_turns_and_a_seed_repeats():
    """Oracle: itself from the same seed; the task's heads."""
    one, two, other = (list(pairs(14, 320, seeded(seed), split="held-out")) for seed in (0, 0, 1))
    assert one == two != other
    assert [text for text, _ in one[5::7] if not re.search("^Passage 1: ", text, re.M)] == []
    assert all("pass phrase" in short for _, short in one[6::7])


def test_the_command_writes_json_lines(tmp_path, monkeypatch):
    """Oracle: what was asked for, half of each length."""
    asked = []
    monkeypatch.setattr(module, "pairs", lambda n, length, generator: asked.append((n, length)) or [("a\nb", "b")] * n)
    main(tmp_path / "pairs.jsonl", 6, 0, (10, 20))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows == [["a\nb", "b"]] * 6 and asked == [(3, 10), (3, 20)]
