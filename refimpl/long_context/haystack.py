r"""A pass key somewhere in long prose: the needle in texts of the user's own.

Source: `kv-compression-bench` (arXiv 2407.01527), the passkey task: keys of 7 or 64 digits, lengths and depths on a grid; official code
henryzhongsc/longctx_bench@72204d09514f4c26aead889de3c892845ff007ee, `eval/passkey_utils/`.

Differs from the paper: the sentences around the key are ours, tell it once, and nothing before the text says that there will be one;
lengths are parts of what the model can read, in its tokens, where the paper has 512 to 20,480 words. A short key is right if the first
digits that are said are it, where there it may stand anywhere in what is said. A long one is right in part by the share of digits in
their places, where there it is the longest run of its digits that is said.

Not here: several keys in one text.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

TOLD = "\nThe pass key is {key}. Remember it.\n"
QUESTION = "\n\nQuestion: What is the pass key?\nAnswer: The pass key is"


class Needle(NamedTuple):
    """A prompt in two parts, the score of what is said to it, and where the key stands in how many tokens."""

    context: str
    question: str
    score: Callable[[str], float]
    depth: float
    length: int


def texts(folder: Path) -> str:
    """All prose of a folder, its *.txt files one after the other.

    Raises:
        ValueError: there is none.
    """
    found = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not any(text.strip() for text in found):
        raise ValueError(f"{folder}: no text in *.txt to hide a needle in")
    return "\n\n".join(found)


def needle(tokenizer: Tokenizer, text: str, length: int, depth: float, digits: int, draw: Random) -> Needle:
    """A key of so many digits in the first `length` tokens of a text, question included.

    Args:
        tokenizer: the model's.
        text: the prose.
        length: tokens of the prompt at most, with the special ones; a few less where the tokenizer joins what is put together.
        depth: where the key stands, 0 the beginning, 1 the end.
        digits: of the key.
        draw: source of the key.

    Raises:
        ValueError: key and question alone are longer.

    Examples:
        >>> from refimpl.testbed.tokenizer import tokenizer
        >>> found = needle(tokenizer(), "water under bridges " * 99, 120, 0.5, 7, Random(0))
        >>> found.score(" 7345682."), found.score("no idea")
        (0.0, 0.0)
    """
    key = "".join(draw.choices("0123456789", k=digits))
    told = TOLD.format(key=key)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    question = len(encode(QUESTION).ids)
    room = length - len(tokenizer.encode(told).ids) - question
    offsets = encode(text).offsets
    while room >= 0:
        kept = offsets[:room]
        end = kept[-1][1] if kept else 0
        at = kept[min(round(depth * len(kept)), len(kept) - 1)][0] if depth < 1 and kept else end
        context = f"{text[:at]}{told}{text[at:end]}"
        over = len(tokenizer.encode(context).ids) + question - length  # where words are cut, there may be more tokens
        if over <= 0:
            return Needle(context, QUESTION, partial(exact if digits <= 7 else in_place, key), depth, length)
        room = len(kept) - over
    raise ValueError(
        f"length={length} tokens is too short for a key of {digits} digits and its question, which take {length - room}: give more "
        "prose, or a model that reads more"
    )


def exact(key: str, prediction: str) -> float:
    """1 if the first digits of a prediction are the key.

    Examples:
        >>> exact("123", " 123."), exact("123", "1234")
        (1.0, 0.0)
    """
    return float(_first_digits(prediction) == key)


def in_place(key: str, prediction: str) -> float:
    """Share of the key's digits that a prediction has in their places.

    Examples:
        >>> in_place("1234", " 1294")
        0.75
    """
    said = _first_digits(prediction)
    return sum(a == b for a, b in zip(said, key, strict=False)) / len(key)


def _first_digits(text: str) -> str:
    found = re.search(r"\d+", text)
    return found[0] if found else ""
