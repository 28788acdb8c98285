"""The tokenizer: whatever goes in comes out, digits and lines stand alone, the world's words are single."""

import json

import pytest

from refimpl.testbed import corpus, world
from refimpl.testbed.tokenizer import CHECKPOINT, END, END_ID, VOCABULARY, learn, tokenizer


def encode(text):
    return tokenizer().encode(text).ids


@pytest.mark.parametrize("text", ["", "def f(x):\n\n    return x\t# ä € 漢\n", "a" * 3000, "\r\n \n", "007 1e10"])
def test_decoding_gives_the_text_back(text):
    assert tokenizer().decode(encode(text)) == text


def test_every_digit_is_a_token_of_its_own():
    ids = encode("1234567890")
    assert len(ids) == 10
    assert len(set(ids)) == 10


def test_tokens_do_not_reach_over_a_line_break():
    """What makes sizes of lines add up."""
    text = "".join(corpus.lines("held-out", "any").lines[:300])
    pieces = [tokenizer().decode([token]) for token in encode(text)]
    assert "".join(pieces) == text
    assert all(piece == "\n" or "\n" not in piece for piece in pieces)


@pytest.mark.parametrize("word", world.WORDS)
def test_words_of_the_world_are_single_tokens(word):
    assert len(encode(f" {word}")) == 1


def test_the_end_is_the_first_entry_and_no_text_makes_it():
    assert tokenizer().token_to_id(END) == END_ID == 0
    assert tokenizer().get_vocab_size() == VOCABULARY
    assert END_ID not in encode("<|end |>")


def test_learning_makes_single_tokens_of_the_words_it_is_given():
    """Negative control: a word that it was not given, in a text of nothing else, is in pieces."""
    made = learn(["la la la"] * 10, ["- zyx abc\n"])
    assert len(made.encode(" zyx").ids) == len(made.encode(" abc").ids) == 1
    assert len(made.encode(" qrs").ids) == 4


@pytest.mark.slow
def test_the_committed_tokenizer_is_what_training_makes_of_this_interpreter():
    """Only where the interpreter's library is that of the training; a deterministic count of pairs."""
    from refimpl.testbed import train

    trained = json.loads((CHECKPOINT / "training.json").read_text())
    if corpus.digest() != trained["corpus"]:
        pytest.skip("the interpreter is another than the checkpoint was trained with")
    assert train.learn_tokenizer().to_str() == tokenizer().to_str()
