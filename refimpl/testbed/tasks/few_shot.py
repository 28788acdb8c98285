"""Words of a few kinds carry labels that mean something in this text alone; a new word of a kind that was seen gets its label."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact as score
from refimpl.testbed.sample import Sample, compose
from refimpl.testbed.world import COLOURS, FACTS

VERSION = 1
FILLER = "any"
ANSWER_TOKENS = 3

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]

KINDS = tuple(fact.values for kind, fact in FACTS.items() if kind != "colour")


def sample(length: int, filler: Lines, draw: Random, *, turns: int = 2) -> Sample:
    """2 to 5 kinds, 4 to 8 examples of each, and `turns` words of each kind that no example shows."""
    kinds = draw.sample(KINDS, draw.randint(2, 5))
    labels = draw.sample(COLOURS, len(kinds))
    shuffled = [draw.sample(kind, len(kind)) for kind in kinds]
    shots = draw.randint(4, 8)
    told = [f"- {word} => {label}" for words, label in zip(shuffled, labels, strict=True) for word in words[:shots]]
    draw.shuffle(told)
    asked = [
        (f"- {word} =>", f" {label}")
        for words, label in zip(shuffled, labels, strict=True)
        for word in words[shots : shots + turns]
    ]
    draw.shuffle(asked)
    return compose(told, asked, length, filler, draw)


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Some label."""
    return draw.choice(COLOURS)
