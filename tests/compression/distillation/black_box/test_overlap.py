"""BLEU of a sentence and ROUGE-L: worked numbers, and the testbed's own ROUGE-L."""

import random

import pytest

from refimpl.compression.distillation.black_box.overlap import most_alike, rouge_l, sentence_bleu
from refimpl.testbed import metrics


@pytest.mark.parametrize(
    ("candidate", "reference", "order", "expected"),
    [
        ("the the the the the the the", "the cat is on the mat", 1, 2 / 7),  # Papineni et al., Section 2.1
        ("a b c d e", "a b c x e", 4, (4 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25),  # no match of four: half a match
        ("a b c d", "a x c y", 4, (2 / 4 * 0.5 / 3 * 0.25 / 2 * 0.125 / 1) ** 0.25),  # three orders without
        ("a b", "a b c d", 4, 0.36787944),  # exp(1 - 4/2); there are no n-grams of three or four
        ("a b c d", "a b", 1, 2 / 4),  # longer is not punished but by precision
        ("x y", "a b c", 2, (0.5 / 2 * 0.25 / 1) ** 0.5 * 0.60653066),  # exp(1 - 3/2)
        ("", "a", 4, 0),
        ("a", "", 4, 0),
    ],
)
def test_bleu_by_hand(candidate, reference, order, expected):
    """Oracle: by hand."""
    assert sentence_bleu(candidate.split(), reference.split(), order) == pytest.approx(expected, abs=1e-7)


def test_bleu_of_tokens_and_its_order():
    """Oracle: the same text in words."""
    words, tokens = sentence_bleu(["a", "b", "c"], ["a", "b", "d"]), sentence_bleu((1, 2, 3), (1, 2, 4))
    assert words == tokens and 0 < words < 1
    with pytest.raises(ValueError, match="order=0 must be at least 1"):
        sentence_bleu("a", "a", 0)


def test_rouge_is_the_testbeds_and_the_most_alike_is_the_highest():
    """Oracle: `refimpl.testbed.metrics.rouge_l`, and its maximum over all."""
    draw = random.Random(0)
    texts = [draw.choices("abcd", k=draw.randint(1, 7)) for _ in range(60)]
    scores = [rouge_l(texts[0], other) for other in texts[1:]]
    assert scores == [metrics.rouge_l(" ".join(texts[0]), " ".join(other)) for other in texts[1:]]
    assert len(set(scores)) > 5
    for i in range(10):
        assert most_alike(texts[i], texts[20:]) == max(rouge_l(texts[i], other) for other in texts[20:])
    assert rouge_l((), (1, 2)) == most_alike((), [(1, 2), ()]) == most_alike((1,), []) == 0
