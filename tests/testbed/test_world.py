"""The world's words: none stands for two kinds of thing."""

from collections import Counter

from refimpl.testbed import world


def test_no_value_is_of_two_kinds():
    counts = Counter(value for fact in world.FACTS.values() for value in fact.values)
    assert [value for value, n in counts.items() if n > 1] == []


def test_lists_repeat_nothing():
    for words in (world.NAMES, world.VERBS, world.NOUNS, world.ARGUMENTS, world.WORDS):
        assert len(set(words)) == len(words)


def test_there_are_enough_words_for_the_longest_phrase():
    assert len(world.WORDS) > 3 * 64
    assert len(world.NAMES) >= 60


def test_every_kind_is_told_and_asked_in_its_own_words():
    told = {fact.told.format(name="X", value="Y") for fact in world.FACTS.values()}
    asked = {fact.asked.format(name="X") for fact in world.FACTS.values()}
    assert len(told) == len(asked) == len(world.FACTS) == 7
