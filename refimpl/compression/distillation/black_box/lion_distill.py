r"""Lion: the teacher's answers are learnt, judged against the student's, and the teacher writes more of what is hard.

Source: `lion-distillation` (arXiv 2305.12870), Section 3: imitation, discrimination, generation; official code
YJiangcm/Lion@0d94c4c7e2e5e545dc68253f6e242712b9e4edc0, `src/discrimination.py` (both orders, $d \ge 1$),
`src/generate_hard_instruction.py`, `src/generate_easy_instruction.py` (ROUGE-L above 0.7) and `README.md` (3000 of each kind
beside 52 thousand at first).

Differs from the paper: where all instructions are hard, or all easy, new ones are written after the one kind that there is; and
where too few pass the filter, the generator is asked 20 times for each at most. New easy ones are compared with the new hard ones
too. In `distill`, windows of plain text ask nothing: the first part of a window is an instruction, what the teacher writes after
it the answer, and `roles.Continuing` plays the roles; the first pool is what has been read when its share of the steps is over.

Not here: how long a student is trained on a pool, its batches and rates, which belong to `Student`; in `distill` each pool is
gone through once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.black_box.pools import Pools, T, Tokens, unlike
from refimpl.compression.distillation.black_box.roles import Continuing, Roles, continuations, gap
from refimpl.compression.distillation.protocol import BlackBox, Run, Sequences, Write, writer
from refimpl.compression.distillation.sampling import check_prompt, kept_tokens, written_mask

TRIES = 20  # for each instruction that is wanted


class Student(Protocol[T]):
    """What `Lion.teach` asks of a student."""

    def learn(self, lessons: Sequence[tuple[T, T]]) -> None:
        """Imitation: go on learning, from pairs of an instruction and its answer."""
        ...

    def answer(self, instructions: Sequence[T]) -> list[T]:
        """An answer to each instruction."""
        ...


@dataclass(frozen=True)
class Round(Generic[T]):
    """What one round found in the cache pool, and what was written: the next train pool."""

    hard: list[T]
    easy: list[T]
    new_hard: list[T]
    new_easy: list[T]


@dataclass(frozen=True, kw_only=True)
class Lion(BlackBox):
    r"""Adversarial distillation: `teach` is the loop over texts, `distill` runs it over windows of plain text.

    Args:
        iterations: rounds of discrimination and generation, each followed by imitation; the first imitation comes before.
        threshold: $\tau$, an instruction is hard if the teacher's mean score is higher by as much.
        growth: new instructions of a round, half of them hard, as a share of the first train pool; the paper's are 6 to 52
            thousand.
        similarity: a new instruction whose ROUGE-L with any other is above is dropped.
        prompt: share of a window of plain text that stands for an instruction; ours.

    Examples:
        >>> def write(prompts, n, *, temperature=0.0, beams=None):
        ...     return prompts[:, -1:].expand(-1, n)
        >>> batch = torch.tensor([[1, 2, 5, 6]])
        >>> Lion().sequences(batch, nn.Identity(), write, torch.Generator()).tokens.tolist()  # imitation of one answer
        [[1, 2, 2, 2]]
    """

    iterations: int = 3
    threshold: float = 1.0
    growth: float = 6 / 52
    similarity: float = 0.7
    prompt: float = 0.5

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} must be 0 (imitation only) or more; the paper has 3")
        if not 0 < self.threshold <= 9:
            raise ValueError(
                f"threshold={self.threshold} must be in (0, 9], a gap of scores of 1 to 10; the paper's is 1"
            )
        if not 0 < self.growth < float("inf"):
            raise ValueError(f"growth={self.growth} must be above 0; 6 / 52 is the paper's")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} must be in (0, 1]; 0.7 is the paper's")
        check_prompt(self.prompt)

    def teach(
        self, student: Student[T], roles: Roles[T], seed: Sequence[T], generator: torch.Generator
    ) -> list[Round[T]]:
        """Imitation of the seed, and then `iterations` times discrimination, generation and imitation of what is new.

        Args:
            student: learns in place.
            roles: the closed model: `roles.Prompted` of one, or any object with the three methods.
            seed: instructions that both pools begin with.
            generator: of the draws of instructions that new ones are written after.

        Returns:
            What each round found and wrote.

        Raises:
            ValueError: an empty seed, or scores outside 1 to 10.
        """
        if not seed:
            raise ValueError("seed=[]: at least one instruction is needed")
        pools = Pools(list(seed), list(dict.fromkeys(seed)))
        student.learn(pools.lessons(pools.train, roles.answer))
        rounds = []
        for _ in range(self.iterations):
            rounds.append(self.round(pools, roles, student.answer, self.new_of_a_kind(len(seed)), generator))
            student.learn(pools.lessons(pools.train, roles.answer))
        return rounds

    def new_of_a_kind(self, first: int) -> int:
        """How many hard instructions a round writes, and how many easy ones, after a first pool of `first`.

        Examples:
            >>> Lion().new_of_a_kind(52_000), Lion().new_of_a_kind(3)
            (3000, 1)
        """
        return max(1, round(self.growth * first / 2))

    def round(
        self,
        pools: Pools[T],
        roles: Roles[T],
        answer: Callable[[Sequence[T]], list[T]],
        n: int,
        generator: torch.Generator,
    ) -> Round[T]:
        """Discrimination over the cache pool and generation: the train pool is replaced, the cache pool enriched."""
        hard, easy = self.discriminate(pools, roles, answer)
        new_hard = self.written(roles, hard or easy, n, pools.cache, generator, hard=bool(hard))
        new_easy = self.written(roles, easy or hard, n, [*pools.cache, *new_hard], generator, hard=not easy)
        pools.renew([*new_hard, *new_easy])
        return Round(hard, easy, new_hard, new_easy)

    def discriminate(
        self, pools: Pools[T], roles: Roles[T], answer: Callable[[Sequence[T]], list[T]]
    ) -> tuple[list[T], list[T]]:
        """Hard and easy instructions of the cache pool: student and teacher answer each, and the referee compares."""
        hard: list[T] = []
        easy: list[T] = []
        lessons = pools.lessons(pools.cache, roles.answer)
        for (instruction, theirs), ours in zip(lessons, answer(pools.cache), strict=True):
            (hard if gap(roles, instruction, theirs, ours) >= self.threshold else easy).append(instruction)
        return hard, easy

    def written(
        self,
        roles: Roles[T],
        given: Sequence[T],
        n: int,
        others: Sequence[T],
        generator: torch.Generator,
        *,
        hard: bool,
    ) -> list[T]:
        """Up to n new instructions after some that are drawn from those given, none too similar to another."""
        new: list[T] = []
        for _ in range(TRIES):
            drawn = torch.randint(len(given), (n - len(new),), generator=generator, device=generator.device).tolist()
            created = [one for one in roles.create([given[i] for i in drawn], hard=hard) if one is not None]
            new += unlike(created, [*others, *new], self.similarity)
            if len(new) == n:
                break
        return new

    def sequences(
        self,
        batch: Tensor,
        student: nn.Module,  # noqa: ARG002 - it is asked by the loop only
        write: Write,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Sequences:
        """Imitation alone: the first part of each row, and what the teacher writes after it, which counts."""
        kept = kept_tokens(batch.shape[1], self.prompt)
        tokens = torch.cat((batch[:, :kept], write(batch[:, :kept], batch.shape[1] - kept)), dim=1)
        return Sequences(tokens, written_mask(tokens, self.prompt))

    def begin(
        self,
        student: nn.Module,  # noqa: ARG002 - each step brings both
        teacher: nn.Module,  # noqa: ARG002
        steps: int,
        generator: torch.Generator,  # noqa: ARG002
        unseen: Tensor | None = None,  # noqa: ARG002
    ) -> Run:
        """The loop over windows of plain text; `step` without it imitates the batch, as the first steps do."""
        return Loop(self, steps)


class Loop(Run):
    """One training on windows of plain text: a long first part, and shorter ones on what the rounds write.

    Args:
        method: its settings.
        steps: of the whole training.
    """

    def __init__(self, method: Lion, steps: int) -> None:
        super().__init__(method)
        self.lion, self.steps, self.done, self.rounds = method, steps, 0, 0
        self.pools: Pools[Tokens] = Pools([], [])
        self.n, self.place = 0, 0  # new instructions of a kind; where in the train pool the next batch begins

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of the next step; of the teacher the method gets its text."""
        return self.lion.objective(student, self.sequences(batch, student, writer(teacher, generator), generator))

    def starts(self) -> list[int]:
        """The step before which each round takes place: a pool has steps by its size, and the first one step at least.

        Examples:
            >>> Loop(Lion(), 350).starts()
            [260, 290, 320]
        """
        share, count = self.lion.growth, self.lion.iterations
        return [max(1, round(self.steps * (1 + k * share) / (1 + count * share))) for k in range(count)]

    def sequences(self, batch: Tensor, student: nn.Module, write: Write, generator: torch.Generator) -> Sequences:
        """The batch with the teacher's answers, until the first round; then batches of the pool that a round wrote."""
        due = sum(start <= self.done for start in self.starts())
        self.done += 1
        kept = kept_tokens(batch.shape[1], self.lion.prompt)
        if not due:
            return self._first(batch, kept, student, write, generator)
        roles = Continuing(write, batch.shape[1] - kept, self.pools.answers, batch.device)
        if due > self.rounds:  # rounds that have no step between them are one
            self.n = self.n or self.lion.new_of_a_kind(len(self.pools.cache))
            self.lion.round(self.pools, roles, _speaker(student, roles.n, batch.device, generator), self.n, generator)
            self.rounds, self.place = due, 0
        places = [(self.place + i) % len(self.pools.train) for i in range(len(batch))]
        self.place += len(batch)
        lessons = self.pools.lessons([self.pools.train[place] for place in places], roles.answer)
        tokens = torch.tensor([[*instruction, *text] for instruction, text in lessons], device=batch.device)
        return Sequences(tokens, written_mask(tokens, self.lion.prompt))

    def _first(
        self, batch: Tensor, kept: int, student: nn.Module, write: Write, generator: torch.Generator
    ) -> Sequences:
        """The batch with the teacher's answers, which join the pools."""
        given = self.lion.sequences(batch, student, write, generator)
        self.pools.answers.update((tuple(row[:kept]), tuple(row[kept:])) for row in given.tokens.tolist())
        self.pools.train = self.pools.cache = list(self.pools.answers)
        return given


def _speaker(
    student: nn.Module, n: int, device: torch.device, generator: torch.Generator
) -> Callable[[Sequence[Tokens]], list[Tokens]]:
    """A function that has the student answer in evaluation mode, by its likeliest tokens."""

    def answer(instructions: Sequence[Tokens]) -> list[Tokens]:
        training = student.training
        student.eval()
        try:
            return continuations(writer(student, generator), instructions, n, device=device)
        finally:
            student.train(training)

    return answer
