"""The three roles: what is asked, and what is made of the texts that come back."""

import pytest
import torch

from refimpl.compression.distillation.black_box.roles import Continuing, Prompted, gap, is_usable, scores_of
from refimpl.testbed.metrics import rouge_l


def test_each_role_shows_the_model_what_it_needs():
    """Oracle: the prompts, caught: instruction and answers in order; a hard one keeps the kind of task, an easy one is rarer."""
    prompts, replies = (
        [],
        iter([" 3 \n", "fine\nScore of Assistant 1: 9\nScore of Assistant 2: 4", "Add six and five.", "Sing"]),
    )

    def ask(prompt):
        prompts.append(prompt)
        return next(replies)

    roles = Prompted(ask)
    assert roles.answer(["Add 1 and 2."]) == ["3"]
    assert roles.review("Add 1 and 2.", "three", "four") == (9, 4)
    assert roles.create(["Add 1 and 2."], hard=True) == ["Add six and five."]
    assert roles.create(["Add 1 and 2."], hard=False) == [None]
    assert all("\nAdd 1 and 2.\n" in prompt for prompt in prompts)
    assert prompts[1].index("three") < prompts[1].index("four")
    assert "same kind of task" in prompts[2] and "rarer" not in prompts[2]
    assert "rarer" in prompts[3] and "same kind of task" not in prompts[3]


@pytest.mark.parametrize(
    ("review", "expected"),
    [
        ("Reasons: 3 of 5.\nScore of the Assistant 1: 7\nScore of the Assistant 2: 8.5\n", (7, 8.5)),
        ("Score of Assistant 1: 10\nScore of Assistant 2: 1", (10, 1)),
        ("Score of Assistant 2: 7\nScore of Assistant 1: 8", None),  # the other order
        ("Score of Assistant 1: 7\nScore of Assistant 2: 8\nThe first is worse.", None),
        ("Score of Assistant 1: 11\nScore of Assistant 2: 8", None),
        ("Score of Assistant 1: good\nScore of Assistant 2: 8", None),
        ("Score of Assistant 1: 7", None),
        ("", None),
    ],
)
def test_scores_of_a_review(review, expected):
    """Oracle: by hand; the official format has `the` before the name."""
    assert scores_of(review) == expected


def test_a_review_without_scores_is_asked_for_again():
    """Oracle: the number of calls: until there are scores, five times at most."""
    calls = []
    replies = ["?", "?", "Score of Assistant 1: 2\nScore of Assistant 2: 3"]

    def ask(prompt):
        calls.append(prompt)
        return replies[len(calls) - 1]

    assert Prompted(ask).review("a", "b", "c") == (2, 3) and len(calls) == 3
    calls.clear()
    replies = ["nothing"] * 9
    with pytest.raises(ValueError, match=r"review of 'a' ends 'nothing'.* last two lines"):
        Prompted(ask).review("a", "b", "c")
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("Name a red fruit.", True),
        ("7 + 8 is what?", True),
        ("Name a fruit", False),  # three words
        ("", False),
        ('"Name a red fruit."', False),
        ("Übersetze diesen kurzen Satz.", False),
        ("Write an Instruction for a baker.", False),
    ],
)
def test_what_can_be_an_instruction(text, usable):
    """Oracle: the official filter, case by case."""
    assert is_usable(text) is usable


class Biased(Prompted):
    """A referee who likes the first answer better by a point, and the right one by three."""

    def __init__(self):
        super().__init__(lambda prompt: "")

    def review(self, instruction, first, second):
        return 5.0 + 3 * (first == "right") + 1, 5.0 + 3 * (second == "right")


def test_both_orders_cancel_the_referees_bias():
    """Oracle: by hand; in one order the gap would be one point off."""
    roles = Biased()
    assert gap(roles, "x", "right", "wrong") == 3 and gap(roles, "x", "right", "right") == 0
    assert gap(roles, "x", "wrong", "right") == -3
    first, second = roles.review("x", "right", "right")
    assert first - second == 1
    roles.review = lambda instruction, first, second: (0, 5)
    with pytest.raises(ValueError, match=r"scores \(0, 5, 0, 5\) of 'x' must be 1 to 10"):
        gap(roles, "x", "right", "wrong")


def test_a_model_of_plain_text_plays_the_roles():
    """Oracle: a model that counts on, by hand; scores by the testbed's ROUGE-L; what is known is not asked for again."""
    asked = []

    def write(prompts, n, *, temperature=0.0, beams=None):
        asked.append((prompts.tolist(), n, temperature))
        return prompts[:, -1:] + 1 + torch.arange(n)

    known = {(1, 2, 3, 4): (5, 6)}
    roles = Continuing(write, 2, known)
    assert roles.answer([(1, 2, 3, 4), (2, 2, 2, 2), (2, 2, 2, 2)]) == [(5, 6), (3, 4), (3, 4)]
    assert asked == [([[2, 2, 2, 2]], 2, 0.0)] and known[2, 2, 2, 2] == (3, 4)
    expected = 1 + 9 * rouge_l("3 5", "3 4")
    assert roles.review((2, 2, 2, 2), (3, 4), (3, 5)) == (10, pytest.approx(expected))
    assert roles.create([(1, 2, 3, 4), (4, 3, 2, 1)], hard=True) == [(1, 2, 3, 4), (4, 3, 4, 5)]
    assert roles.create([(1, 2, 3, 4)], hard=False) == [(1, 2, 3, 4)] and asked[-1] == ([[1]], 3, 1.0)
    assert roles.create([(7,)], hard=True) == [(7,)]  # nothing to draw
    many = [(i, 0, 0, 0) for i in range(130)]
    assert len(roles.answer(many)) == 130 and [len(rows) for rows, _, _ in asked[-3:]] == [64, 64, 2]
