r"""The roles that one closed model plays for a student: it answers, it judges answers, it writes new instructions.

Source: `lion-distillation` (arXiv 2305.12870), Section 3 and the prompts in its appendix; official code
YJiangcm/Lion@0d94c4c7e2e5e545dc68253f6e242712b9e4edc0, `src/chatgpt_inference.py`, `src/chatgpt_referee.py`,
`src/prompt_hard.txt`, `src/prompt_easy.txt` and `src/generate_hard_instruction.py` (which texts are no instruction).

Differs from the paper: the prompts' words are ours. A review without scores is asked for again a few times, in the official
code for ever. An instruction is a text, or its tokens where a model of plain text plays the roles.

Not here: temperatures of each role (0.7, 0.2 and 1 in the official code), which belong to who is asked; limits of length.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from refimpl.compression.distillation.black_box.overlap import rouge_l
from refimpl.compression.distillation.black_box.pools import T, Tokens
from refimpl.compression.distillation.protocol import Write

TRIES = 5  # to get scores out of a review
AT_ONCE = 64  # prompts in a batch
ECHO = "instruction"  # a text that speaks of it repeats the prompt


class Roles(Protocol[T]):
    """What is asked of the closed model; anything that has these three can play."""

    def answer(self, instructions: Sequence[T]) -> list[T]:
        """Teacher: an answer to each instruction."""
        ...

    def review(self, instruction: T, first: T, second: T) -> tuple[float, float]:
        """Referee: a score of each of two answers, 1 to 10."""
        ...

    def create(self, instructions: Sequence[T], *, hard: bool) -> list[T | None]:
        """Generator: a new instruction in the manner of each, None where it wrote no usable one.

        For a hard one of the same domain and kind of task, for an easy one of the same domain, but rarer.
        """
        ...


class Prompted:
    r"""All three roles by prompts to one model.

    Args:
        ask: the closed model, prompt to text.

    Examples:
        >>> roles = Prompted(lambda prompt: "Both try.\nScore of Assistant 1: 8\nScore of Assistant 2: 6.5")
        >>> roles.review("Name a fruit.", "Plum.", "Salt.")
        (8.0, 6.5)
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self.ask = ask

    def answer(self, instructions: Sequence[str]) -> list[str]:
        """Teacher: an answer to each instruction."""
        return [self.ask(f"### Instruction:\n{instruction}\n\n### Response:\n").strip() for instruction in instructions]

    def review(self, instruction: str, first: str, second: str) -> tuple[float, float]:
        """Referee: a score of each of two answers, 1 to 10.

        Raises:
            ValueError: no two scores of 1 to 10 in any of five reviews.
        """
        prompt = (
            f"[Instruction]\n{instruction}\n\n[Answer of Assistant 1]\n{first}\n\n[Answer of Assistant 2]\n{second}\n\n[Task]\n"
            "Judge how helpful, relevant, correct and detailed each answer is, whatever their order. Give your reasons first; "
            "then end with two lines, each with a score of 1 to 10, higher being better:\n"
            "Score of Assistant 1: <score>\nScore of Assistant 2: <score>"
        )
        for _ in range(TRIES):
            text = self.ask(prompt)
            scores = scores_of(text)
            if scores is not None:
                return scores
        raise ValueError(
            f"the review of {instruction!r} ends {text[-80:]!r}: its last two lines must give the scores of Assistant 1 and 2"
        )

    def create(self, instructions: Sequence[str], *, hard: bool) -> list[str | None]:
        """Generator: a new instruction in the manner of each."""
        manner = "and the same kind of task" if hard else "but be rarer"
        asks = (
            f"Take the instruction below as a model for one new instruction. It must belong to the same domain {manner}, be about "
            "as long and as difficult, and make sense to a human who is to follow it. Reply with the new one alone.\n\n"
            f"#Given#:\n{instruction}\n\n#New#:"
            for instruction in instructions
        )
        return [text if is_usable(text) else None for text in (self.ask(prompt).strip() for prompt in asks)]


class Continuing:
    """All three roles by a model of plain text, which can't be told what to do: it goes on writing.

    An answer is the likeliest continuation; a score is 1 + 9 times its ROUGE-L with that one; a new instruction keeps the first
    half of a hard one, or the first quarter of an easy one, and draws the rest.

    Args:
        write: the model.
        n: tokens of an answer.
        known: answers that it has given already; it adds to them.
        device: where it reads.
    """

    def __init__(self, write: Write, n: int, known: dict[Tokens, Tokens], device: torch.device | str = "cpu") -> None:
        self.write, self.n, self.known, self.device = write, n, known, device

    def answer(self, instructions: Sequence[Tokens]) -> list[Tokens]:
        """Teacher: an answer to each instruction."""
        missing = [instruction for instruction in dict.fromkeys(instructions) if instruction not in self.known]
        self.known.update(zip(missing, continuations(self.write, missing, self.n, device=self.device), strict=True))
        return [self.known[instruction] for instruction in instructions]

    def review(self, instruction: Tokens, first: Tokens, second: Tokens) -> tuple[float, float]:
        """Referee: a score of each of two answers, 1 to 10."""
        [own] = self.answer([instruction])
        return 1 + 9 * rouge_l(first, own), 1 + 9 * rouge_l(second, own)

    def create(self, instructions: Sequence[Tokens], *, hard: bool) -> list[Tokens | None]:
        """Generator: a new instruction in the manner of each."""
        length = len(instructions[0]) if instructions else 0
        kept = max(1, length // (2 if hard else 4))
        heads = [instruction[:kept] for instruction in instructions]
        if kept == length:
            return [*heads]
        tails = continuations(self.write, heads, length - kept, temperature=1.0, device=self.device)
        return [head + tail for head, tail in zip(heads, tails, strict=True)]


def gap(roles: Roles[T], instruction: T, theirs: T, ours: T) -> float:
    """$d = a - b$, the teacher's mean score less the student's, over both orders of the answers.

    Raises:
        ValueError: a score outside 1 to 10.
    """
    a_first, b_second = roles.review(instruction, theirs, ours)
    b_first, a_second = roles.review(instruction, ours, theirs)
    scores = (a_first, a_second, b_first, b_second)
    if not all(1 <= score <= 10 for score in scores):
        raise ValueError(f"scores {scores} of {instruction!r} must be 1 to 10")
    return (a_first + a_second - b_first - b_second) / 2


def continuations(
    write: Write, prompts: Sequence[Tokens], n: int, *, temperature: float = 0.0, device: torch.device | str = "cpu"
) -> list[Tokens]:
    """What is written after prompts of one length, in batches."""
    found: list[Tokens] = []
    for first in range(0, len(prompts), AT_ONCE):
        rows = write(torch.tensor(prompts[first : first + AT_ONCE], device=device), n, temperature=temperature)
        found += [tuple(row) for row in rows.tolist()]
    return found


def scores_of(review: str) -> tuple[float, float] | None:
    r"""The scores in the last two lines of a review, the first assistant's first; None if they aren't there.

    Examples:
        >>> scores_of("Score of Assistant 1: 10\nScore of Assistant 2: 0") is None  # 0 is no score
        True
    """
    lines, found = review.strip().split("\n")[-2:], []
    for number, line in enumerate(lines, 1):
        score = re.fullmatch(rf".*Assistant {number}[^:]*:\s*(\d+(?:\.\d+)?)\s*", line)
        if score and 1 <= float(score[1]) <= 10:
            found.append(float(score[1]))
    return (found[0], found[1]) if len(found) == 2 else None


def is_usable(text: str) -> bool:
    """Whether a text can be an instruction: more than three words, begins with an ASCII letter or digit, no echo of the prompt.

    Examples:
        >>> [is_usable(text) for text in ("Name a red fruit.", "Name fruit.", "- Name a fruit", "A new instruction: sing a song")]
        [True, False, False, False]
    """
    return (
        len(text.split()) > 3 and text[0].isascii() and text[0] not in string.punctuation and ECHO not in text.lower()
    )
