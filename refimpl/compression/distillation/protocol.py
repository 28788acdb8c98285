r"""What all distillation methods share: a student is trained on what a teacher says.

Glossary
    student         the model that is trained; any module from tokens to logits, or to an object with `logits`
    teacher         the model it learns from; never changed, never given a gradient
    student_logits  $z$, `[..., vocabulary]`
    teacher_logits  $v$, the same shape
    labels          $y$, `[...]`, the token that really follows
    mask            `[...]`, True where a position counts; None counts all
    batch           `[batch, time + 1]` tokens of the training text
    sequences       what the student learns from in one step: the batch, or what a model wrote
    run             what lives through one training: a buffer, a schedule, matrices that are trained beside the student

A white-box method sees the teacher's logits: it is a loss, and, if it does not learn from the batch as it is, a choice of
sequences. A black-box method gets a function that returns text the teacher wrote, and nothing else of the teacher, in whose place
`distill` hands it a `TextOnly`:

    white box   sequences(batch, student, teacher, generator) -> Sequences;  loss(student_logits, teacher_logits, labels, mask)
    black box   sequences(batch, student, write, generator) -> Sequences;    the loss is that of plain training

A method that compares more than logits (hidden states, attention) overrides `objective`. `step` is what a training loop calls,
and `distill` such a loop. A method that remembers something from step to step overrides `begin`, whose `Run` holds it:

Examples:
    >>> from refimpl.compression.distillation.white_box.hinton_kd import HintonKD
    >>> teacher, student = (nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)) for _ in range(2))
    >>> text, generator = (torch.arange(300) % 7).view(10, 30), torch.Generator().manual_seed(0)
    >>> optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    >>> len(distill(student, teacher, HintonKD(), optimizer, iter([text] * 5), 5, generator))
    5

Invariants, run for every method by `tests/compression/distillation/test_protocol.py`: only the student moves; a loss is a
finite scalar, the same for the same input; positions that the mask leaves out change neither loss nor gradient; half
precision is accumulated in float32; another vocabulary is refused; a black-box method never meets a logit; a configuration
holds nothing of a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.model.beam import beam_search
from refimpl.model.generate import generate
from refimpl.model.model import Decoder
from refimpl.model.train import train


@dataclass(frozen=True)
class Sequences:
    """What the student learns from in one step.

    Attributes:
        tokens: `[batch, time + 1]`, the last one being target only.
        mask: `[batch, time]`, True where the token that follows counts; None counts all.
    """

    tokens: Tensor
    mask: Tensor | None = None


class Write(Protocol):
    """All that a black-box method can do with a teacher."""

    def __call__(self, prompts: Tensor, n: int, *, temperature: float = 0.0, beams: int | None = None) -> Tensor:
        """Text of n tokens after prompts `[batch, time]`: `[batch, n]`; with beams, the likeliest first `[batch, beams, n]`."""
        ...


class Distillation(ABC):
    """A method: a frozen dataclass of settings."""

    @abstractmethod
    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step of training on a batch, a scalar whose gradient reaches the student only."""

    def begin(
        self,
        student: nn.Module,  # noqa: ARG002 - for those that remember, as all of these
        teacher: nn.Module,  # noqa: ARG002
        steps: int,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
        unseen: Tensor | None = None,  # noqa: ARG002
    ) -> "Run":
        """What lives through one training; arguments as of `distill`. Here nothing does."""
        return Run(self)


class Run:
    """One training by a method: what lives from step to step stands here, and the method stays a frozen setting.

    Args:
        method: whose training it is.
    """

    def __init__(self, method: Distillation) -> None:
        self.method = method

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of the next step."""
        return self.method.step(student, teacher, batch, generator)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the student, by the same optimizer."""
        return []


class WhiteBox(Distillation):
    """A method that sees the teacher's logits: a frozen dataclass of settings."""

    def sequences(
        self,
        batch: Tensor,
        student: nn.Module,  # noqa: ARG002 - for those that let a model write, as the next two
        teacher: nn.Module,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> Sequences:
        """What to learn from in this step: the batch as it is."""
        return Sequences(batch)

    @abstractmethod
    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """A scalar, float32 at least, whose gradient reaches the student's logits only.

        Raises:
            ValueError: shapes do not fit, or no position counts (`check_logits`).
        """

    def objective(self, student: nn.Module, teacher: nn.Module, given: Sequences) -> Tensor:
        """The loss over sequences; the teacher reads them without a gradient."""
        inputs = given.tokens[:, :-1]
        with torch.no_grad():
            teacher_logits = logits_of(teacher, inputs)
        return self.loss(logits_of(student, inputs), teacher_logits, given.tokens[:, 1:], given.mask)

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step of training on a batch."""
        return self.objective(student, teacher, self.sequences(batch, student, teacher, generator))


class BlackBox(Distillation):
    """A method that sees text only that the teacher wrote: a frozen dataclass of settings."""

    @abstractmethod
    def sequences(self, batch: Tensor, student: nn.Module, write: Write, generator: torch.Generator) -> Sequences:
        """What to learn from in this step."""

    def objective(self, student: nn.Module, given: Sequences) -> Tensor:
        """Mean cross-entropy of the tokens that count."""
        return label_loss(logits_of(student, given.tokens[:, :-1]), given.tokens[:, 1:], given.mask)

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step of training on a batch; of the teacher the method gets its text."""
        return self.objective(student, self.sequences(batch, student, writer(teacher, generator), generator))


class TextOnly(nn.Module):
    """What stands for a teacher of which text is all there is: `writer` takes it, and it has no weights and gives no logits.

    Args:
        teacher: who writes.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.writer = partial(writer, teacher)  # no module of this one's

    def forward(self, *_inputs: Tensor) -> Tensor:
        """There are no logits.

        Raises:
            TypeError: always.
        """
        raise TypeError("this teacher shows its text only: a method that reads logits is a WhiteBox")


def distill(
    student: nn.Module,
    teacher: nn.Module,
    method: Distillation,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    steps: int,
    generator: torch.Generator,
    *,
    unseen: Tensor | None = None,
    **options: Any,
) -> list[float]:
    """Train the student in place, and return the loss of each step.

    Args:
        student: in training mode from here on.
        teacher: put into evaluation mode; not changed. A `refimpl.model` Decoder for methods that let it write.
        method: what to learn.
        optimizer: over the student's parameters; it is lent what else the method trains, at its own default settings.
        batches: `[batch, time + 1]` tokens each, at least `steps` of them.
        steps: number of updates.
        generator: of what the method draws, on the models' device.
        unseen: `[rows, time + 1]`, text held back, for methods that watch the loss on it.
        options: as of `refimpl.model.train.train`: clip, schedule.

    Raises:
        ValueError: no steps, batches that end before, or vocabularies that differ.
    """
    teacher.eval()
    if isinstance(method, BlackBox):
        teacher = TextOnly(teacher)
    run = method.begin(student, teacher, steps, generator, unseen)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return run.step(model, teacher, batch, generator)

    beside = run.parameters()
    if beside:
        optimizer.add_param_group({"params": beside})
    try:
        return train(student, optimizer, batches, steps, loss=loss, **options)
    finally:
        if beside:
            optimizer.param_groups.pop()
            for parameter in beside:
                optimizer.state.pop(parameter, None)


def writer(teacher: nn.Module, generator: torch.Generator) -> Write:
    """A function that has the teacher write, and gives away nothing else of it."""
    if isinstance(teacher, TextOnly):
        return teacher.writer(generator)

    def write(prompts: Tensor, n: int, *, temperature: float = 0.0, beams: int | None = None) -> Tensor:
        if not isinstance(teacher, Decoder):
            raise ValueError(f"teacher={type(teacher).__name__} can't write: pass a refimpl.model Decoder")
        if beams is not None:
            if temperature != 0:
                raise ValueError(f"beams={beams} take the likeliest tokens: leave temperature={temperature} out")
            return beam_search(teacher, prompts, n, beams).tokens
        return generate(teacher, prompts, n, temperature=temperature, generator=generator)

    return write


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[batch, time, vocabulary]` of a model that returns them, or an object that has them, as transformers' do."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that count, in one row: `[..., size]` to `[positions, size]`, float32 at least.

    Examples:
        >>> counted(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([True, False, True])).tolist()
        [[1.0], [3.0]]
    """
    rows = x.flatten(0, -2) if mask is None else x[mask]
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def label_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the labels that count, in nats: plain training.

    Examples:
        >>> label_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).exp().item()
        4.0
    """
    return F.cross_entropy(counted(logits, mask), labels.flatten() if mask is None else labels[mask])


def check_logits(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None) -> None:
    """Check what a white-box loss is called with.

    Raises:
        ValueError: shapes do not fit, or no position counts.

    Examples:
        >>> check_logits(torch.ones(1, 3, 4), torch.ones(1, 3, 5), torch.ones(1, 3), None)
        Traceback (most recent call last):
        ValueError: the student's vocabulary has 4 tokens and the teacher's 5: both must be one; sequence-kd needs text only
    """
    ours, theirs = student_logits.shape, teacher_logits.shape
    if ours[-1] != theirs[-1]:
        raise ValueError(
            f"the student's vocabulary has {ours[-1]} tokens and the teacher's {theirs[-1]}: both must be one; "
            "sequence-kd needs text only"
        )
    if ours != theirs or ours[:-1] != labels.shape or (mask is not None and mask.shape != labels.shape):
        raise ValueError(
            f"logits {tuple(ours)} and {tuple(theirs)}, labels {tuple(labels.shape)} and mask "
            f"{None if mask is None else tuple(mask.shape)} must be [..., vocabulary] twice and [...]"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype} must be bool: True where a position counts")
    if labels.numel() == 0 or (mask is not None and not bool(mask.any())):
        raise ValueError("no position counts: labels are empty, or the mask leaves out all of them")
