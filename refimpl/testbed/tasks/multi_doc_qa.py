"""Each document tells whom a person works for and where they live; asked is where somebody's boss lives: two documents.

The answer tells both steps, and its last word counts.
"""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import exact
from refimpl.testbed.sample import Sample, ask, compose
from refimpl.testbed.world import CITIES, NAMES

VERSION = 2
FILLER = "any"
ANSWER_TOKENS = 10

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]


def sample(length: int, filler: Lines, draw: Random, *, turns: int = 5) -> Sample:
    """Between 3 documents and one in 48 tokens; `turns` people are asked for, at most."""
    n = draw.randint(3, max(3, min(16, length // 48)))
    people = draw.sample(NAMES, n)
    city = {name: draw.choice(CITIES) for name in people}
    boss = {name: draw.choice([other for other in people if other != name]) for name in people}
    told = [
        f"Document {i}\n- {name} works for {boss[name]}.\n- {name} lives in {city[name]}."
        for i, name in enumerate(people, 1)
    ]
    questions = [
        (
            ask(f"Where does the boss of {name} live?", f"{name} works for"),
            f" {boss[name]}. {boss[name]} lives in {city[boss[name]]}",
        )
        for name in draw.sample(people, min(n, turns))
    ]
    return compose(told, questions, length, filler, draw)


def score(prediction: str, answer: str) -> float:
    """1 if the last words are the same.

    Examples:
        >>> score("Rita. Rita lives in Rome", "Otto. Otto lives in Rome"), score("", "Otto. Otto lives in Rome")
        (1.0, 0.0)
    """
    return exact(*(" ".join(text.split()[-1:]) for text in (prediction, answer)))


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Some city."""
    return draw.choice(CITIES)
