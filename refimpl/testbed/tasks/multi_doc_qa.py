"""Each document tells whom a person works for and where they live; asked is where somebody's boss lives: two documents."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import f1 as score
from refimpl.testbed.sample import Sample, ask, compose
from refimpl.testbed.world import CITIES, NAMES

VERSION = 1
FILLER = "any"
ANSWER_TOKENS = 3

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]


def sample(length: int, filler: Lines, draw: Random) -> Sample:
    """Between 3 documents and one in 48 tokens."""
    n = draw.randint(3, max(3, min(16, length // 48)))
    people = draw.sample(NAMES, n)
    city = {name: draw.choice(CITIES) for name in people}
    boss = {name: draw.choice([other for other in people if other != name]) for name in people}
    told = [
        f"Document {i}\n- {name} works for {boss[name]}.\n- {name} lives in {city[name]}."
        for i, name in enumerate(people, 1)
    ]
    asked = draw.sample(people, min(n, 5))
    turns = [(ask(f"Where does the boss of {name} live?"), f" {city[boss[name]]}") for name in asked]
    return compose(told, turns, length, filler, draw)


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Some city."""
    return draw.choice(CITIES)
