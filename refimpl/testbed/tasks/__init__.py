"""The testbed's tasks: texts that a person can read, drawn from a seed, each with its score.

Each module has

    VERSION          counts up whenever the same seed would give another text
    FILLER           which real text surrounds what is asked for: `code`, `prose` or `any`
    ANSWER_TOKENS    enough for the longest answer and its end
    sample(length, filler, draw) -> Sample
    score(prediction, answer) -> 0 to 1
    guess(question, draw) -> what one answers who knows the task and has not read the context

Examples:
    >>> import torch
    >>> example = samples("few_shot", 1, 256, torch.Generator().manual_seed(0))[0]
    >>> example.question.endswith("=>"), example.answer.startswith(" ")
    (True, True)
"""

import importlib
from random import Random
from typing import Any, Protocol, cast

import torch

from refimpl.testbed.corpus import Lines, Split, lines
from refimpl.testbed.sample import Sample

NAMES = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "code_completion", "retrieval", "needle")


class Task(Protocol):
    """A task's module."""

    VERSION: int
    FILLER: str
    ANSWER_TOKENS: int

    def sample(self, length: int, filler: Lines, draw: Random, **options: Any) -> Sample:
        """One example of at most `length` tokens."""
        ...

    def score(self, prediction: str, answer: str) -> float:
        """How right a prediction is, 0 to 1."""
        ...

    def guess(self, question: str, draw: Random) -> str:
        """The answer of somebody who has not read the context."""
        ...


def task(name: str) -> Task:
    """A task's module by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; tasks are {', '.join(NAMES)}")
    return cast(Task, importlib.import_module(f"refimpl.testbed.tasks.{name}"))


def samples(
    name: str,
    n: int,
    length: int,
    generator: torch.Generator,
    *,
    split: Split = "held-out",
    **options: Any,
) -> list[Sample]:
    """Draw examples of a task.

    Args:
        name: which task.
        n: how many.
        length: tokens of a whole example at most, further questions included.
        generator: source of randomness.
        split: where the text around comes from.
        options: the task's own: `words`, `needles` and `depth` of the needle.

    Raises:
        ValueError: no such task, or a length that its question does not fit in.
    """
    module = task(name)
    draw = Random(int(torch.randint(2**62, (), generator=generator)))
    filler = lines(split, module.FILLER)
    return [module.sample(length, filler, draw, **options) for _ in range(n)]


def blind_score(name: str, n: int, length: int, generator: torch.Generator) -> float:
    """Mean score of who guesses without reading the context."""
    module = task(name)
    draw = Random(0)
    return sum(module.score(module.guess(s.question, draw), s.answer) for s in samples(name, n, length, generator)) / n
