r"""Instructions that a student is taught by: those it learns from next, those that have been asked for so far.

Source: `lion-distillation` (arXiv 2305.12870), Section 3, train pool and cache pool; official code
YJiangcm/Lion@0d94c4c7e2e5e545dc68253f6e242712b9e4edc0, `src/generate_hard_instruction.py`, for which new ones are let in.

Differs from the paper: the teacher is asked once for each instruction, whichever pool it stands in.

Not here: pools on a disk; the stemming of words, which the official code leaves out as well.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from refimpl.compression.distillation.black_box.overlap import most_alike

Tokens = tuple[int, ...]
T = TypeVar("T", bound=str | Tokens)  # an instruction or an answer, as a text or in tokens


@dataclass
class Pools(Generic[T]):
    """What is learnt from next, all that has been asked for so far, and the teacher's answers.

    Examples:
        >>> pools = Pools(["Add 1 and 2."], ["Add 1 and 2."])
        >>> pools.lessons(pools.train, lambda asked: ["3" for _ in asked])
        [('Add 1 and 2.', '3')]
        >>> pools.renew(["Add 5 and 2."])
        >>> pools.train, len(pools.cache)
        (['Add 5 and 2.'], 2)
    """

    train: list[T]
    cache: list[T]
    answers: dict[T, T] = field(default_factory=dict)

    def lessons(self, instructions: Sequence[T], answer: Callable[[Sequence[T]], list[T]]) -> list[tuple[T, T]]:
        """Instructions and the teacher's answers, which `answer` gives where there is none yet."""
        missing = [instruction for instruction in dict.fromkeys(instructions) if instruction not in self.answers]
        if missing:
            self.answers.update(zip(missing, answer(missing), strict=True))
        return [(instruction, self.answers[instruction]) for instruction in instructions]

    def renew(self, new: Sequence[T]) -> None:
        """New instructions replace the train pool, unless there are none, and join the cache pool."""
        self.train = [*new] or self.train
        self.cache = [*self.cache, *new]


def unlike(new: Iterable[T], others: Sequence[T], similarity: float) -> list[T]:
    """Those that are no more alike than `similarity`, by ROUGE-L, to any other, nor to one let in before them.

    Examples:
        >>> unlike(["Name a red fruit", "Name a red fruit!", "Sing a sad song"], ["Name a green fruit"], 0.7)
        ['Sing a sad song']
    """
    words, found = [words_of(other) for other in others], []
    for instruction in new:
        if most_alike(words_of(instruction), words) <= similarity:
            found.append(instruction)
            words.append(words_of(instruction))
    return found


def words_of(instruction: str | Tokens) -> Sequence[Hashable]:
    """What two instructions are compared by: lower-case words, or tokens.

    Examples:
        >>> words_of("Name a Fruit!")
        ['name', 'a', 'fruit']
    """
    return re.findall(r"[a-z0-9]+", instruction.lower()) if isinstance(instruction, str) else instruction
