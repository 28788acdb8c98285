r"""A pass key somewhere in long prose: the needle in texts of the user's own.

Source: `kv-compression-bench` (arXiv 2407.01527), the passkey task: keys of 7 or 64 digits, lengths and depths on a grid; official code
henryzhongsc/longctx_bench@72204d09514f4c26aead889de3c892845ff007ee, `eval/passkey_utils/`.

Differs from the paper: the sentences around the key are ours; lengths are parts of what the model can read, in its tokens,
where the paper has 512 to 20,480 words; a key is right in part by the share of digits in their places.

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
        length: tokens of the prompt; a few less where the tokenizer joins what is put together.
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
    room = length - len(encode(told).ids) - len(encode(QUESTION).ids)
    if room < 0:
        raise ValueError(f"length={length} tokens is too short: key and question take {length - room}")
    offsets = encode(text).offsets[:room]
    end = offsets[-1][1] if offsets else 0
    at = offsets[min(round(depth * len(offsets)), len(offsets) - 1)][0] if depth < 1 and offsets else end
    score = exact if digits <= 7 else in_place
    return Needle(f"{text[:at]}{told}{text[at:end]}", QUESTION, partial(score, key), depth, length)


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
