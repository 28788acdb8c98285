"""The tasks' scores, against their definitions worked by hand and by other code."""

import difflib
import itertools
from random import Random

import pytest

from refimpl.testbed.metrics import edit_similarity, exact, f1, rouge_l


def test_f1_worked_by_hand():
    """Oracle: by hand. 2 of 3 given words are right, 2 of 4 right ones given: 2 (2/3)(1/2) / (2/3 + 1/2) = 4/7."""
    assert f1("red red blue", "red blue green grey") == pytest.approx(4 / 7)
    assert f1("red red", "red") == pytest.approx(2 / 3)  # a word counts as often as the answer has it
    assert f1("blue", "red") == f1("", "red") == 0


def test_rouge_l_by_brute_force():
    """Oracle: the longest common subsequence among all of them."""
    draw = Random(0)
    for _ in range(60):
        a, b = (draw.choices("wxyz", k=draw.randint(1, 6)) for _ in range(2))
        longest = max(
            n for n in range(len(a) + 1) if set(itertools.combinations(a, n)) & set(itertools.combinations(b, n))
        )
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * longest / (len(a) + len(b)))


def test_order_matters_to_rouge_l_alone():
    assert f1("a b c", "c b a") == 1
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("same", "same", 0)]
)
def test_edit_similarity_of_known_distances(one, other, distance):
    """Oracle: the textbook's distances."""
    assert edit_similarity(one, other) == pytest.approx(1 - distance / max(len(one), len(other)))
    assert edit_similarity(other, one) == edit_similarity(one, other)


def test_edit_similarity_is_bounded_by_what_two_strings_share():
    """Oracle: difflib. A distance is at least the longer length less the matching characters of the best alignment."""
    draw = Random(1)
    for _ in range(40):
        a, b = ("".join(draw.choices("abc", k=draw.randint(1, 8))) for _ in range(2))
        matching = sum(block.size for block in difflib.SequenceMatcher(None, a, b, False).get_matching_blocks())
        assert edit_similarity(a, b) >= 1 - (len(a) + len(b) - 2 * matching) / max(len(a), len(b)) - 1e-9


def test_exact_forgives_spaces_around_and_nothing_else():
    assert exact(" 12 ", "12") == 1
    assert exact("1 2", "12") == 0
    assert exact("", "12") == 0
