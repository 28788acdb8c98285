"""Labels by hand and against the longest common subsequence, rates by their formulas, filters by sorting."""

import random

import pytest

from refimpl.data.prompting.compression.annotation import Annotation, annotate, folded, label, split, trusted


def test_labels_by_hand():
    """Oracle: by hand. The second "cat" of the compressed text is found behind the first, which has its label already."""
    original = ["the", "cat", "saw", "a", "cat", "and", "the", "dog"]
    assert label(original, ["cat", "saw", "cat", "dog"]) == [False, True, True, False, True, False, False, True]
    assert label(original, ["cat", "cat", "cat"]) == [False, True, False, False, True, False, False, False]
    assert label(original, []) == [False] * 8 and label([], ["cat"]) == []


def test_the_search_looks_back():
    """Oracle: by hand. The teacher turned the order round: "b" is found one step back from "c"; with a window of 1 it isn't."""
    assert label(["a", "b", "c"], ["c", "b"]) == [False, True, True]
    assert label(["a", "b", "c"], ["a", "b"], window=1) == [True, False, False]


def test_forward_comes_before_backward():
    """Oracle: by hand. From position 2 both "x" are one step away; then the other one is taken."""
    assert label(["a", "x", "b", "x"], ["b", "x"]) == [False, False, True, True]
    assert label(["a", "x", "b", "x"], ["b", "x", "x"]) == [False, True, True, True]


def test_the_thread_moves_by_half_a_window_at_most():
    """Oracle: by hand, window 4. "z" at 3 is found from 0 and labelled, but the search goes on from 2; so "a" at 5 is 3 steps
    away, and "b" at 6, 4 steps from 2, would have been found from 3."""
    original = ["o", "p", "q", "z", "r", "a", "b"]
    assert label(original, ["z", "b"], window=4) == [False, False, False, True, False, False, False]
    assert label(original, ["z", "a"], window=4) == [False, False, False, True, False, True, False]
    assert label(original, ["z", "b"], window=5)[6]  # negative control


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window} must be at least 1"):
        label(["a"], ["a"], window)


def common(one, other):
    """Positions in `one` of a longest common subsequence, by the textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i in reversed(range(len(one))):
        for j in reversed(range(len(other))):
            same = one[i] == other[j]
            table[i][j] = 1 + table[i + 1][j + 1] if same else max(table[i + 1][j], table[i][j + 1])
    i, j, found = 0, 0, set()
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            found.add(i)
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def test_labels_are_the_longest_common_subsequence_where_no_word_repeats():
    """Oracle: dynamic programming, on texts of different words of which the teacher left some out and invented others."""
    draw = random.Random(0)
    for _ in range(200):
        original = [f"w{i}" for i in draw.sample(range(99), draw.randint(1, 30))]
        told = [word for word in original if draw.random() < 0.4]
        for _ in range(draw.randint(0, 3)):
            told.insert(draw.randint(0, len(told)), f"x{draw.random()}")
        assert {i for i, kept in enumerate(label(original, told)) if kept} == common(original, told)


def test_repeated_words_are_labelled_once_each():
    """Oracle: counting. As many of a word are labelled as the teacher kept, if the original has them and the window covers all."""
    draw = random.Random(1)
    for _ in range(200):
        original = [draw.choice("abcd") for _ in range(draw.randint(1, 30))]
        told = [draw.choice("abcde") for _ in range(draw.randint(0, 12))]
        labels = label(original, told, window=10_000)
        for word in "abcde":
            marked = sum(kept and o == word for o, kept in zip(original, labels, strict=True))
            assert marked == min(told.count(word), original.count(word))


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "def f(x_1):\n\tpass  \n\n", "é—ü 12.5%, ok?\r\n", "  a  "])
def test_words_joined_are_the_text(text):
    assert "".join(split(text)) == text


def test_words_by_hand():
    assert split("Anna's 2 cats, ran.\n  x_1") == ["Anna", "'", "s", " 2", " cats", ",", " ran", ".", "\n", "  x_1"]
    assert [folded(word) for word in (" The", "\n", "  \n", "  ", ",")] == ["the", "\n", "\n", " ", ","]


def test_rates_by_hand():
    """Oracle: the formulas. 6 original words, 5 compressed: "dog" and "cat" twice each, of which the original has one "dog", and
    "bird", which it lacks. VR = 1/5; HR = 4/6, MR = 3/6, so AG = 1/6."""
    found = annotate("The dog saw a cat cat", "dog dog bird cat cat")
    assert found.labels == [False, True, False, False, True, True]
    assert found.variation_rate == pytest.approx(1 / 5) and found.alignment_gap == pytest.approx(4 / 6 - 3 / 6)


def test_a_teacher_that_only_leaves_out_has_no_rates_above_zero():
    """Oracle: by definition; letters' case does not count. Negative control: another word."""
    assert annotate("The dog, it BARKED", "dog barked")[2:] == (0.0, 0.0)
    assert annotate("The dog, it BARKED", "")[2:] == (0.0, 0.0)
    assert annotate("The dog, it BARKED", "dog howled").variation_rate == 0.5


def test_words_out_of_the_windows_reach_widen_the_gap():
    """Oracle: by hand. "z" is 9 words away, beyond a window of 5: 1 hit, no match, 10 words."""
    text = " ".join("abcdefghiz")
    assert annotate(text, "z", window=5).alignment_gap == pytest.approx(0.1)
    assert annotate(text, "z").alignment_gap == 0


def test_nothing_to_label_is_refused():
    with pytest.raises(ValueError, match="original has no word"):
        annotate("", "dog")


def rated(rates):
    return [Annotation([str(i)], [True], variation, gap) for i, (variation, gap) in enumerate(rates)]


def names(annotations):
    return [int(annotation.words[0]) for annotation in annotations]


def test_filters_take_the_worst_by_sorting():
    """Oracle: sorting. Of 101 pairs with different rates 5 go by variation; of the 96 left 10 by gap: all beyond the percentile
    0.9 * 95 = 85.5, between the 86th and the 87th."""
    draw = random.Random(0)
    rates = [(draw.random(), draw.random()) for _ in range(101)]
    left = sorted(range(101), key=lambda i: rates[i][0])[:96]
    assert names(trusted(rated(rates))) == sorted(sorted(left, key=lambda i: rates[i][1])[:86])


def test_pairs_that_are_all_equally_good_stay():
    """Oracle: by definition; the widest gap of the others goes."""
    assert names(trusted(rated([(0.0, 0.0)] * 30))) == list(range(30))
    assert names(trusted(rated([(0.0, 0.0)] * 29 + [(0.0, 0.3)]))) == list(range(29))
    assert names(trusted(rated([(0.1, 0.2), (0.2, 0.1)]), variation=0, gap=0)) == [0, 1]
    assert trusted([]) == []


@pytest.mark.parametrize("change", [{"variation": 1.5}, {"gap": -0.1}])
def test_shares_are_checked(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be in"):
        trusted([], **change)
