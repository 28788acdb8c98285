"""Which instructions are learnt from, which are let in, and that the teacher is asked once."""

import pytest

from refimpl.compression.distillation.black_box.pools import Pools, unlike, words_of
from refimpl.testbed.metrics import rouge_l


def test_the_teacher_is_asked_once_for_each():
    """Oracle: what it was asked."""
    asked = []

    def answer(instructions):
        asked.append(list(instructions))
        return [instruction.upper() for instruction in instructions]

    pools = Pools(["a", "b", "a"], ["a", "b"])
    assert pools.lessons(pools.train, answer) == [("a", "A"), ("b", "B"), ("a", "A")]
    pools.renew(["c", "d"])
    assert pools.lessons(["b", "c"], answer) == [("b", "B"), ("c", "C")]
    assert pools.lessons(["b", "c"], answer) == [("b", "B"), ("c", "C")]
    assert asked == [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="zip"):
        pools.lessons(["e", "f"], lambda instructions: ["E"])


def test_new_ones_replace_the_train_pool_and_join_the_cache_pool():
    """Oracle: by hand; without new ones the train pool stays."""
    pools = Pools([(1, 2)], [(1, 2), (3, 4)])
    pools.renew([(5, 6)])
    assert (pools.train, pools.cache) == ([(5, 6)], [(1, 2), (3, 4), (5, 6)])
    pools.renew([])
    assert (pools.train, pools.cache) == ([(5, 6)], [(1, 2), (3, 4), (5, 6)])


def test_what_is_too_much_alike_is_dropped():
    """Oracle: the testbed's ROUGE-L of lower-case words, one by one: 0.7 is let in, more is not."""
    others = ["a b c d e f g h i j"]
    new = ["A, b c d e f g x y z!", "a b c d e f g h x y", "k l m", "K l m", "a b c d e f g x z y"]
    assert rouge_l(new[0].lower().replace(",", "").replace("!", ""), others[0]) == 0.7
    assert rouge_l(new[1], others[0]) == 0.8
    assert unlike(new, others, 0.7) == [new[0], "k l m"]  # the last is like the first
    assert unlike(new, others, 1.0) == new and unlike(new, [], 0.05) == [new[0], "k l m"]
    assert unlike([(1, 2, 3), (1, 2, 4)], [(1, 2, 3)], 0.7) == [(1, 2, 4)]
    assert words_of("") == [] and words_of((3, 4)) == (3, 4)
