"""LongBench's scores. Oracle: worked by hand from the definitions of its evaluation; the official code gave the same numbers."""

import pytest

from refimpl.long_context import longbench_metrics as metrics


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Answer, is: Rome!", "rome", 2 / 4),  # answer, is, rome: one of three and one of one
        ("rome rome", "Rome", 2 / 3),  # a word counts as often as both have it
        ("a an the", "the", 0.0),  # nothing is left of either
        ("Ann's", "Anns", 1.0),
        ("", "Rome", 0.0),
    ],
)
def test_f1_of_words(prediction, answer, score):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("sat cat the", "the cat sat", 1 / 3),  # one word in order
        ("the the cat", "the cat", 1.0),  # different words are counted
        ("the cat. a dog", "a dog. the cat", 1.0),  # sentence by sentence, in any order
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 13),  # the union w1 w2 w3 w5, of 5 and of 8 words
        ("", "a", 0.0),
        (".", "a", 0.0),
        ("a b", "b. a", 1.0),
    ],
)
def test_rouge_l_of_sentences(prediction, answer, score):
    assert metrics.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-7)


def test_of_several_longest_subsequences_the_one_found_from_the_end():
    """Oracle: the official code's choice: of `a` and `b` it finds b in "a b" against "b a", and a in the other order."""
    assert metrics._common_subsequence(["a", "b"], ["b", "a"]) == ["b"]
    assert metrics._common_subsequence(["b", "a"], ["a", "b"]) == ["a"]


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Date", "Date", 1.0),
        ("Date or Place", "Date", 0.5),
        ("Place", "Date", 0.0),
        ("Date of birth", "Date of birth", 1.0),  # Date is a part of it, and is struck off
        ("", "Date", 0.0),
    ],
)
def test_classes(prediction, answer, score):
    assert metrics.classification(prediction, answer, ["Date", "Date of birth", "Place"]) == score


def test_a_class_after_one_that_is_struck_off_is_not_looked_at():
    """Oracle: the official loop by hand: D is struck off, Da slides into its place and stays, so that two classes are named."""
    assert metrics.classification("Date", "Date", ["D", "Da", "Date"]) == 0.5
    assert metrics.classification("Date", "Date", ["Date", "D"]) == 1.0


def test_numbers():
    assert metrics.count("There are 12, no, 7 of 7", "7") == pytest.approx(2 / 3)
    assert metrics.count("none", "7") == 0
    assert metrics.retrieval("Paragraph 7 or Paragraph 17", "Paragraph 7") == 0.5
    assert metrics.retrieval("seven", "Paragraph 7") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("return x", "return x", 1.0),
        ("\n\n# no\n```\nreturn x\nmore", "return x", 1.0),  # the first line without marks
        ("ab", "abcd", 0.67),  # 2 * 2 / 6, in whole percent
        ("// no", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_code(prediction, answer, score):
    assert metrics.code_similarity(prediction, answer) == pytest.approx(score, abs=1e-12)
