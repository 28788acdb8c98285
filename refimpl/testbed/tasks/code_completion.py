"""Functions are defined somewhere in a long module; a call at its end is completed with the names of their parameters."""

from random import Random

from refimpl.testbed.corpus import Lines
from refimpl.testbed.metrics import edit_similarity as score
from refimpl.testbed.sample import Sample, compose
from refimpl.testbed.world import ARGUMENTS, NOUNS, VERBS

VERSION = 1
FILLER = "code"
ANSWER_TOKENS = 12

__all__ = ["ANSWER_TOKENS", "FILLER", "VERSION", "guess", "sample", "score"]


def sample(length: int, filler: Lines, draw: Random, *, turns: int = 4) -> Sample:
    """2 to 6 functions of 2 to 4 parameters; no two begin with the same verb; `turns` are called, at most."""
    n = draw.randint(2, 6)
    functions = {
        f"{verb}_{draw.choice(NOUNS)}": ", ".join(draw.sample(ARGUMENTS, draw.randint(2, 4)))
        for verb in draw.sample(VERBS, n)
    }
    told = [f"def {name}({arguments}):\n    pass" for name, arguments in functions.items()]
    asked = draw.sample(sorted(functions), min(n, turns))
    return compose(told, [(f"result = {name}(", f"{functions[name]})") for name in asked], length, filler, draw)


def guess(question: str, draw: Random) -> str:  # noqa: ARG001 - the protocol's
    """Three parameters."""
    return ", ".join(draw.sample(ARGUMENTS, 3)) + ")"
