"""One text tells what people do, like and own, among other things; one fact is asked for, its answer begun as it was told."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import f1 as score
from refimpl.testbed.sample import Sample, ask, compose
from refimpl.testbed.world import FACTS, NAMES, Fact

VERSION = 2
FILLER = "any"
ANSWER_TOKENS = 3

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]


def sample(length: int, filler: Lines, draw: Random, *, turns: int = 6) -> Sample:
    """Between 4 facts and one in 24 tokens, so that longer texts have more to confuse; `turns` of them are asked for, at most."""
    n = draw.randint(4, max(4, length // 24))
    pairs = draw.sample([(name, kind) for name in draw.sample(NAMES, max(4, n // 2)) for kind in FACTS], n)
    facts = [(name, FACTS[kind], draw.choice(FACTS[kind].values)) for name, kind in pairs]
    told = [fact.told.format(name=name, value=value) for name, fact, value in facts]
    asked = [(_asked(name, fact), f" {value}") for name, fact, value in draw.sample(facts, min(n, turns))]
    return compose(told, asked, length, filler, draw)


def _asked(name: str, fact: Fact) -> str:
    lead = fact.told.removeprefix("- ").partition(" {value}")[0]
    return ask(fact.asked.format(name=name), lead.format(name=name))


def guess(question: str, draw: Random) -> str:
    """Some value of the kind that is asked for: the verb tells which."""
    kind = next(
        fact
        for fact in FACTS.values()
        if fact.asked.split("{name}")[0] in question and fact.asked.split("{name}")[1] in question
    )
    return draw.choice(kind.values)
