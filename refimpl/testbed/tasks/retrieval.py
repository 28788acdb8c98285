"""A text is cut into numbered passages; given one line of it, which passage has it?"""

from collections import Counter
from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact as score
from refimpl.testbed.sample import Sample, ask, count, passage

VERSION = 1
FILLER = "any"
ANSWER_TOKENS = 4

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]

PASSAGES = 16  # at most
SIZE = 48  # tokens of a passage, at least
LONGEST = 24  # tokens of a line that is asked for

HEAD = "Passage {}\n"
QUESTION = "Which passage has the line: {}"


def sample(length: int, filler: Lines, draw: Random) -> Sample:
    """2 to 16 passages of equally many lines; asked for are lines that occur once and are neither short nor long.

    Raises:
        ValueError: a length in which two passages and a question do not fit.
    """
    asked = max(1, min(4, length // 128))
    room = length - asked * (LONGEST + count(ask(QUESTION.format("")) + " 16\n"))
    n = draw.randint(2, max(2, min(PASSAGES, room // SIZE)))
    room -= n * count(HEAD.format(16))
    if room < 2 * SIZE:
        raise ValueError(f"length={length} tokens is too short for two passages and {asked} questions")
    while True:
        lines = passage(filler, room, draw)
        bounds = [round(i * len(lines) / n) for i in range(n + 1)]
        where = {line.strip(): i for i in range(n) for line in lines[bounds[i] : bounds[i + 1]]}
        times = Counter(line.strip() for line in lines)
        fit = [line for line in where if times[line] == 1 and 8 <= count(line) <= LONGEST]
        if len(fit) >= asked:
            break
    context = "".join(HEAD.format(i + 1) + "".join(lines[bounds[i] : bounds[i + 1]]) for i in range(n))
    chosen = draw.sample(fit, asked)
    (question, answer), *more = [(ask(QUESTION.format(line)), f" {where[line] + 1}") for line in chosen]
    return Sample(context, question, answer, tuple(more))


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Some number up to that of the longest context's passages."""
    return str(draw.randint(1, PASSAGES))
