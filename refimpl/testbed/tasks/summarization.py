"""Notes stand scattered in a long text; the summary puts together in one line what they say, in order."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import rouge_l as score
from refimpl.testbed.sample import Sample, compose
from refimpl.testbed.world import DRINKS, FACTS, FOODS, NAMES

VERSION = 2
FILLER = "any"
ANSWER_TOKENS = 36

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]

QUESTION = "Summary of the notes:"
THINGS = FOODS + DRINKS


def sample(length: int, filler: Lines, draw: Random) -> Sample:
    """3 to 7 notes, and as many facts that do not belong into the summary."""
    n = draw.randint(3, 7)
    notes = list(zip(draw.sample(NAMES, n), draw.sample(THINGS, n), strict=True))
    told = [f"Note from {name}: {thing}." for name, thing in notes]
    for _ in range(n):
        fact = FACTS[draw.choice(("city", "job", "pet", "colour"))]
        told.insert(
            draw.randint(0, len(told)), fact.told.format(name=draw.choice(NAMES), value=draw.choice(fact.values))
        )
    summary = "".join(f" {name}: {thing}." for name, thing in notes)
    return compose(told, [(QUESTION, summary)], length, filler, draw)


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Notes from five people."""
    return " ".join(f"{name}: {draw.choice(THINGS)}." for name in draw.sample(NAMES, 5))
