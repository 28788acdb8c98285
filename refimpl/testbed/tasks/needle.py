"""Pass phrases stand somewhere in real text; one is asked for, word by word, its answer begun as it was told."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact as score
from refimpl.testbed.sample import Sample, ask, compose
from refimpl.testbed.world import NAMES, WORDS

VERSION = 2
FILLER = "any"
ANSWER_TOKENS = 66

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]


def sample(
    length: int, filler: Lines, draw: Random, *, words: int = 7, needles: int = 1, depth: float | None = None
) -> Sample:
    """Pass phrases of `words` different words.

    Args:
        length: tokens of context, question and answer together, at most.
        filler: the real text.
        draw: source of randomness.
        words: of each phrase, which is as many tokens.
        needles: how many phrases, each of another person.
        depth: where they stand, 0 the beginning, 1 the end; None draws it.
    """
    phrases = {name: " ".join(draw.sample(WORDS, words)) for name in draw.sample(NAMES, needles)}
    told = [f"The pass phrase of {name} is: {phrase}" for name, phrase in phrases.items()]
    turns = [
        (ask(f"What is the pass phrase of {name}?", f"The pass phrase of {name} is:"), f" {phrases[name]}")
        for name in draw.sample(sorted(phrases), needles)
    ]
    return compose(told, turns, length, filler, draw, depth)


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Seven words."""
    return " ".join(draw.sample(WORDS, 7))
