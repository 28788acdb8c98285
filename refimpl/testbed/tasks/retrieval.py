"""A text is cut into numbered passages; one of them is asked for by its number, and its first line told."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact as score
from refimpl.testbed.sample import Sample, ask, count, passage

VERSION = 3
FILLER = "any"
ANSWER_TOKENS = 14

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]

PASSAGES = 16  # at most
SIZE = 48  # tokens of a passage, at least
LONGEST = 12  # tokens of a line that is asked for, at most

HEAD = "Passage {}: "
QUESTION, LEAD = "How does passage {} begin?", "Passage {}:"


def sample(length: int, filler: Lines, draw: Random) -> Sample:
    """2 to 16 passages of equally many lines; asked for are first lines that are neither short nor long.

    Raises:
        ValueError: a length in which two passages and a question do not fit.
    """
    asked = max(1, min(4, length // 128))
    room = length - asked * (LONGEST + count(_ask(PASSAGES) + "\n"))
    n = draw.randint(2, max(2, min(PASSAGES, room // SIZE)))
    room -= n * count(HEAD.format(PASSAGES))
    if room < 2 * SIZE:
        raise ValueError(f"length={length} tokens is too short for two passages and {asked} questions")
    while True:
        lines = passage(filler, room, draw)
        starts = [round(i * len(lines) / n) for i in range(n)]
        first = {i + 1: lines[start].strip() for i, start in enumerate(starts)}
        fit = [i for i, line in first.items() if 4 <= count(f" {line}") <= LONGEST]
        if len(fit) >= min(asked, n):
            break
    for i, start in enumerate(starts, 1):
        lines[start] = f"{HEAD.format(i)}{first[i]}\n"
    (question, answer), *more = [(_ask(i), f" {first[i]}") for i in draw.sample(fit, min(asked, n))]
    return Sample("".join(lines), question, answer, tuple(more))


def _ask(number: int) -> str:
    return ask(QUESTION.format(number), LEAD.format(number))


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """A line that is frequent in programs."""
    return draw.choice(("else:", "try:", "pass", "return None", "return self", "return True", "return False", "raise"))
