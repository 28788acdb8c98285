"""A pass key in prose: where it stands, how long the text is, and what counts."""

from random import Random

import pytest

from refimpl.long_context import haystack
from refimpl.testbed.tokenizer import tokenizer

PROSE = "".join(f"Sentence {i} of a long and quiet text about rivers. " for i in range(300))


def made(length=400, depth=0.5, digits=7, seed=0):
    return haystack.needle(tokenizer(), PROSE, length, depth, digits, Random(seed))


def key_of(found):
    return found.context.split("The pass key is ")[1].split(".")[0]


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("length", [120, 1000])
def test_the_key_stands_at_its_depth_in_a_text_of_its_length(depth, length):
    """Oracle: the prompt, tokenized again; the text without the key is the prose's beginning."""
    found = made(length, depth)
    tokens = len(tokenizer().encode(found.context + found.question).ids)
    assert length - 5 <= tokens <= length
    before, after = found.context.split(haystack.TOLD.format(key=key_of(found)))
    assert PROSE.startswith(before + after)
    assert len(before) / len(before + after) == pytest.approx(depth, abs=0.02)
    assert (found.depth, found.length) == (depth, length)


def test_keys_have_their_digits_and_follow_the_seed():
    assert len(key_of(made(digits=64))) == 64 and key_of(made()).isdigit()
    assert key_of(made()) == key_of(made()) != key_of(made(seed=1))


def test_a_short_key_counts_whole_a_long_one_in_part():
    """Oracle: by hand."""
    short, long = made(), made(digits=64)
    assert short.score(f" {key_of(short)}.") == 1 and short.score(f" {key_of(short)[:-1]}") == 0
    assert short.score(f" {key_of(short)}1") == 0 and short.score("") == 0
    assert long.score(f"It is {key_of(long)[:48]}") == 48 / 64


def test_all_prose_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    assert haystack.texts(tmp_path) == "one\n\ntwo"


def test_too_little_room_and_no_prose(tmp_path):
    with pytest.raises(
        ValueError, match=r"length=10 tokens is too short for a key of 7 digits and its question, which take \d\d"
    ):
        made(length=10)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no text in \*\.txt"):
        haystack.texts(tmp_path)
