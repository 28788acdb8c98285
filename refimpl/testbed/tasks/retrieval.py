"""A text is cut into numbered passages; one of them is asked for by its number, and its first line told."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact as score
from refimpl.testbed.sample import Sample, ask, count, passage

VERSION = 4
FILLER = "any"
ANSWER_TOKENS = 10

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]

PASSAGES = 16  # at most
SIZE = 48  # tokens of a passage, at least
LONGEST = 8  # tokens of a line that is asked for, at most

HEAD = "Passage {}: "
QUESTION, LEAD = "How does passage {} begin?", "Passage {}:"


def sample(length: int, filler: Lines, draw: Random, *, turns: int = 4) -> Sample:
    """2 to 16 passages, which begin with lines that are neither short nor long and hold equally many of such.

    Args:
        length: tokens of context, questions and answers together, at most.
        filler: the real text.
        draw: source of randomness.
        turns: passages asked for, at most one in 128 tokens.

    Raises:
        ValueError: a length in which two passages and a question do not fit.
    """
    asked = max(1, min(turns, length // 128))
    room = length - asked * (LONGEST + count(_ask(PASSAGES) + "\n"))
    n = draw.randint(2, max(2, min(PASSAGES, room // SIZE)))
    room -= n * count(HEAD.format(PASSAGES))
    if room < 2 * SIZE:
        raise ValueError(f"length={length} tokens is too short for two passages and {asked} questions")
    fit = list[int]()
    while len(fit) < n:
        lines = passage(filler, room, draw)
        fit = [at for at, line in enumerate(lines) if 4 <= count(f" {line.strip()}") <= LONGEST]
    starts = [fit[i * len(fit) // n] for i in range(n)]
    first = {number: lines[start].strip() for number, start in enumerate(starts, 1)}
    for number, start in enumerate(starts, 1):
        lines[start] = f"{HEAD.format(number)}{first[number]}\n"
    turn, *more = [(_ask(number), f" {first[number]}") for number in draw.sample(sorted(first), min(asked, n))]
    return Sample("".join(lines), *turn, tuple(more))


def _ask(number: int) -> str:
    return ask(QUESTION.format(number), LEAD.format(number))


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """A line that is frequent in programs."""
    return draw.choice(("else:", "try:", "pass", "return None", "return self", "return True", "return False", "raise"))
