r"""TinyBERT: student layers imitate attention scores and hidden states of teacher layers; then the predictions follow.

Source: `tinybert` (arXiv 1909.10351), Section 3.1, and Section 4.2 for the two stages' lengths; official code
huawei-noah/Pretrained-Language-Model@1bb9b3e49b05279a4ba5cbe805ac81c803f94981, `TinyBERT/task_distill.py` and
`TinyBERT/general_distill.py`.

Differs from the paper: its encoders see all positions; here scores are compared where a query may look. Hidden states are
those that a decoder of pre-normalized layers adds to, not normalized. $W_h$ and $W_e$ stand only where widths differ. The
predictions' cross-entropy lacks the teacher's entropy, which no gradient sees. The official code has one matrix with a bias
for $W_h$ and $W_e$.

Not here: data augmentation; the general stage before (run it on plain text with `inner` = 1); models other than
`refimpl.model`'s decoders, into which `refimpl.model.load` reads checkpoints.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.inside import Scores, decoder_of, read
from refimpl.compression.distillation.protocol import Run, Sequences, WhiteBox, check_logits, counted
from refimpl.compression.distillation.white_box.hinton_kd import soft_divergence


@dataclass(frozen=True, kw_only=True)
class TinyBERT(WhiteBox):
    r"""$L = L_{embd} + \sum_m (L_{hidn} + L_{attn}) + L_{pred}$ (Section 3.1), all weights 1: inner layers first.

    Args:
        temperature: $t$ of the predictions; 1 is the paper's.
        inner: share of the steps that go to the inner layers, the rest to the predictions; the paper's 20 epochs and 3 are
            20/23.
        attention: whether scores are compared, which needs as many heads in the student as in the teacher.
    """

    temperature: float = 1.0
    inner: float = 20 / 23
    attention: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0; 1 is the paper's")
        if not 0 <= self.inner <= 1:
            raise ValueError(
                f"inner={self.inner} must be in [0, 1], the share of steps on inner layers; 20/23 is the paper's"
            )

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The predictions' part, a mean over the positions that count, in float32 at least.

        Args:
            student_logits: `[..., vocabulary]`.
            teacher_logits: the same shape; no gradient reaches them.
            labels: `[...]`; checked, but nothing depends on them.
            mask: `[...]`, True where a position counts; None counts all.

        Raises:
            ValueError: shapes do not fit, or no position counts.

        Examples:
            >>> logits, labels = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([2])
            >>> TinyBERT().loss(logits, logits, labels).item()
            0.0
        """
        check_logits(student_logits, teacher_logits, labels, mask)
        student, teacher = counted(student_logits, mask), counted(teacher_logits.detach(), mask)
        return soft_divergence(student, teacher, self.temperature).mean()

    def objective(self, student: nn.Module, teacher: nn.Module, given: Sequences) -> Tensor:
        """All parts together; for models of one width, as without a training there are no matrices between widths."""
        return self.inner_loss(student, teacher, given) + super().objective(student, teacher, given)

    def inner_loss(
        self,
        student: nn.Module,
        teacher: nn.Module,
        given: Sequences,
        to_hidden: Tensor | None = None,
        to_embedding: Tensor | None = None,
    ) -> Tensor:
        """Embeddings, hidden states and scores, a scalar in float32 at least.

        Args:
            student: a decoder, or a module around one.
            teacher: the same; no gradient reaches it.
            given: what both read.
            to_hidden: $W_h$, `[student's width, teacher's]`; None for equal widths.
            to_embedding: $W_e$, the same shape.

        Raises:
            ValueError: no decoder, widths without a matrix, layers or heads that do not fit.
        """
        inputs, mask = given.tokens[:, :-1], given.mask
        with torch.no_grad():
            theirs = read(teacher, inputs, scores=self.attention)
        ours = read(student, inputs, scores=self.attention)
        total = distance(ours.embedding, theirs.embedding, to_embedding, mask)
        for m, n in enumerate(teacher_layers(len(ours.hidden), len(theirs.hidden))):
            total = total + distance(ours.hidden[m], theirs.hidden[n - 1], to_hidden, mask)
            if self.attention:
                total = total + score_distance(ours.scores[m], theirs.scores[n - 1], mask)
        return total

    def begin(
        self,
        student: nn.Module,
        teacher: nn.Module,
        steps: int,
        generator: torch.Generator,
        unseen: Tensor | None = None,  # noqa: ARG002 - nothing is watched
    ) -> Run:
        """A training's two stages, and its matrices between widths."""
        return Stages(self, student, teacher, steps, generator)


class Stages(Run):
    """Inner layers for the first steps, predictions for the others, and the matrices that are learnt on the way.

    Args:
        method: its settings.
        student: gives one width, and the device.
        teacher: gives the other.
        steps: of the whole training.
        generator: source of the matrices' first values, normal with variance 1 / student's width.
    """

    def __init__(
        self, method: TinyBERT, student: nn.Module, teacher: nn.Module, steps: int, generator: torch.Generator
    ) -> None:
        super().__init__(method)
        self.settings, self.done, self.inner_steps = method, 0, round(method.inner * steps)
        weight = decoder_of(student).embedding.weight
        shape = weight.shape[1], decoder_of(teacher).embedding.weight.shape[1]
        self.matrices: list[nn.Parameter] = []
        if shape[0] != shape[1] and self.inner_steps > 0:
            wide = torch.promote_types(weight.dtype, torch.float32)
            for _ in range(2):
                drawn = torch.randn(shape, generator=generator, device=weight.device, dtype=wide)
                self.matrices.append(nn.Parameter(drawn / shape[0] ** 0.5))

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of the next step."""
        given = self.settings.sequences(batch, student, teacher, generator)
        self.done += 1
        if self.done <= self.inner_steps:
            return self.settings.inner_loss(student, teacher, given, *self.matrices)
        return WhiteBox.objective(self.settings, student, teacher, given)

    def parameters(self) -> list[nn.Parameter]:
        """The matrices $W_h$ and $W_e$, none for models of one width."""
        return self.matrices


def teacher_layers(n_student: int, n_teacher: int) -> list[int]:
    """Teacher's layer of each student's layer, $g(m) = mN/M$, both counted from 1.

    Raises:
        ValueError: the student's number does not divide the teacher's.

    Examples:
        >>> teacher_layers(4, 12)
        [3, 6, 9, 12]
    """
    if n_teacher % n_student:
        raise ValueError(f"the student's {n_student} layers must divide the teacher's {n_teacher}: g(m) = m N/M")
    return [m * n_teacher // n_student for m in range(1, n_student + 1)]


def distance(ours: Tensor, theirs: Tensor, matrix: Tensor | None, mask: Tensor | None) -> Tensor:
    """Mean square of `ours @ matrix - theirs` over the positions that count.

    Args:
        ours: `[batch, time, student's width]`.
        theirs: `[batch, time, teacher's width]`.
        matrix: from one width to the other; None for equal widths.
        mask: `[batch, time]`, True where a position counts; None counts all.

    Raises:
        ValueError: widths that differ, and no matrix.
    """
    if matrix is None and ours.shape != theirs.shape:
        raise ValueError(
            f"widths {ours.shape[-1]} and {theirs.shape[-1]} differ: train with `distill`, which learns a matrix between them"
        )
    x = counted(ours, mask)
    return (x if matrix is None else x @ matrix).sub(counted(theirs, mask)).square().mean()


def score_distance(ours: Scores, theirs: Scores, mask: Tensor | None) -> Tensor:
    """Mean square difference of raw scores, over the heads and what both let the counted queries see.

    Raises:
        ValueError: numbers of heads that differ.
    """
    (a, seen), (b, seen_too) = ours, theirs
    if a.shape != b.shape:
        raise ValueError(
            f"the student has {a.shape[1]} heads and the teacher {b.shape[1]}: scores are compared head by head; "
            "attention=False leaves them out"
        )
    pairs = seen & seen_too
    if mask is not None:
        pairs = pairs & mask[:, None, :, None]
    wide = torch.promote_types(a.dtype, torch.float32)
    squares = (a.to(wide) - b.to(wide)).square()
    return squares[pairs.expand_as(squares)].mean()
