"""What a task hands out, and how its lines are woven into real text."""

from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from refimpl.testbed.corpus import Lines
from refimpl.testbed.tokenizer import tokenizer


class Sample(NamedTuple):
    """One example: `context + question` is the prompt, `answer` and a line break are what follows.

    Attributes:
        context: what is to be read, whole lines.
        question: what is asked, up to where the answer begins.
        answer: the right one.
        more: further questions on the same context with their answers, for training.
    """

    context: str
    question: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """Context and question."""
        return self.context + self.question


def ask(question: str, lead: str = "") -> str:
    """The lines that put a question, and how its answer begins.

    Examples:
        >>> print(ask("Where does Anna live?", "Anna lives in"))
        Question: Where does Anna live?
        Answer: Anna lives in
    """
    return f"Question: {question}\nAnswer: {lead}".rstrip()


def compose(
    told: Sequence[str],
    turns: Sequence[tuple[str, str]],
    length: int,
    filler: Lines,
    draw: Random,
    at: float | None = None,
) -> Sample:
    """A sample of nearly `length` tokens: told lines at random places in real text, then the questions.

    Args:
        told: lines without their ends, in their order; a line may hold several.
        turns: questions with their answers; the first is the sample's.
        length: tokens of context, questions and answers together, at most.
        filler: the real text.
        draw: source of the places.
        at: where all told lines stand, 0 the beginning, 1 the end; None draws each place.

    Raises:
        ValueError: told lines and questions alone are longer.
    """
    told = [line + "\n" for line in told]
    (question, answer), *more = turns
    room = length - count("".join(told)) - sum(count(f"{q}{a}\n") for q, a in turns)
    if room < 0:
        raise ValueError(f"length={length} tokens is too short: what must stand in it takes {length - room}")
    lines = passage(filler, room, draw)
    places = sorted(draw.randint(0, len(lines)) if at is None else round(at * len(lines)) for _ in told)
    for place, line in reversed(list(zip(places, told, strict=True))):
        lines.insert(place, line)
    return Sample("".join(lines), question, answer, tuple(more))


def passage(filler: Lines, room: int, draw: Random) -> list[str]:
    """Successive lines from a random place, at most `room` tokens."""
    starts = bisect_right(filler.until, filler.until[-1] - room) if room <= filler.until[-1] else 0
    first = draw.randrange(max(1, starts))
    last, limit = first, filler.until[first] + room
    while last < len(filler.lines) and filler.until[last + 1] <= limit:
        last += 1
    return filler.lines[first:last]


def count(text: str) -> int:
    """Tokens of a text."""
    return len(tokenizer().encode(text).ids)
