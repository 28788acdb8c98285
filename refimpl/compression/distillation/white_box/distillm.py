r"""DistiLLM: skew divergences, and the student's own text on a schedule and from a buffer.

Source: `distillm` (arXiv 2402.03898), Section 3.1 for the divergences, Section 3.2 for the schedule and the buffer; official
code jongwooko/distillm@d47e77ff9d27721783b32213be38c1204230cc0a, `distillm/losses.py`, `distillm/buffer.py`, `finetune.py`
and `scripts/gpt2/distillm/train_0.1B_1.5B.sh`.

Differs from the paper: windows of plain text have no prompt, so the first part of a window stands for one where the student
writes; a window as it is counts as a whole. The loss that steers the schedule is looked at 20 times in a training, as the
official scripts do with 20 epochs; it is that of `distill`'s `unseen` text, and without one that of the first batch, which is
learnt from once as well. The divergence is complete, where the official code's leaves out the teacher's entropy, which no
gradient sees.

Not here: the official scripts' loss on pre-training text beside the divergence; their constant and rising shares of fresh text.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.divergence import kl, log_mixture
from refimpl.compression.distillation.protocol import (
    Run,
    Sequences,
    WhiteBox,
    check_logits,
    counted,
    label_loss,
    logits_of,
)
from refimpl.compression.distillation.sampling import check_prompt, continued, written_mask

Divergence = Literal["skl", "srkl"]
LOOKS = 20  # at the loss on unseen text, in a training
RISE = 0.1  # of the share, at each look that finds the loss higher


@dataclass(frozen=True, kw_only=True)
class DistiLLM(WhiteBox):
    r"""A skew divergence of teacher $p$ and student $q$ on given text, and ever more on own text as the loss calls for it.

    Args:
        divergence: `skl` is $\mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)$, `srkl` is
            $\mathrm{KL}(q \,\|\, \alpha q + (1 - \alpha) p)$.
        alpha: $\alpha$, how much of the first argument is mixed into the second, in [0, 1); 0 gives the plain divergences.
        share: $\phi$ at the start, the chance that a step learns from the student's text.
        tolerance: $\epsilon$, nats by which the loss on unseen text must have risen before the share does.
        capacity: sequences in the buffer; until it is full, all own text is freshly written.
        prompt: share of a window that is kept where the student writes the rest.

    Examples:
        >>> logits, labels = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([2])
        >>> DistiLLM().loss(logits, logits, labels).abs().item() < 1e-6
        True
    """

    divergence: Divergence = "skl"
    alpha: float = 0.1
    share: float = 0.0
    tolerance: float = 0.1
    capacity: int = 1000
    prompt: float = 0.5

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence={self.divergence!r} must be one of {', '.join(get_args(Divergence))}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must be in [0, 1), the skew; 0.1 is the paper's")
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"share={self.share} must be in [0, 1], the chance of own text at the start; 0 is the paper's"
            )
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} must be 0 or above, in nats; 0.1 is the official code's")
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1 sequence; 1000 is the official code's")
        check_prompt(self.prompt)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean over the positions that count, a scalar in float32 at least.

        Args:
            student_logits: `[..., vocabulary]`.
            teacher_logits: the same shape; no gradient reaches them.
            labels: `[...]`; checked, but nothing depends on them.
            mask: `[...]`, True where a position counts; None counts all.

        Raises:
            ValueError: shapes do not fit, or no position counts.
        """
        check_logits(student_logits, teacher_logits, labels, mask)
        log_p = counted(teacher_logits.detach(), mask).log_softmax(-1)
        log_q = counted(student_logits, mask).log_softmax(-1)
        pair = (log_p, log_q) if self.divergence == "skl" else (log_q, log_p)
        return skew_kl(*pair, self.alpha).mean()

    def begin(
        self,
        student: nn.Module,  # noqa: ARG002 - each step brings both
        teacher: nn.Module,  # noqa: ARG002
        steps: int,
        generator: torch.Generator,  # noqa: ARG002
        unseen: Tensor | None = None,
    ) -> Run:
        """A training's share, buffer and yardstick; `step` without it learns from the batch, as the first step does."""
        return Replay(self, steps, unseen)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    r"""$\mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)$, at most $\log 1/\alpha$.

    Args:
        log_p: `[..., vocabulary]`, log-probabilities.
        log_q: the same shape.
        alpha: in [0, 1).

    Returns:
        `[...]`, in nats.

    Examples:
        >>> apart = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> skew_kl(*apart, 0.5).exp().item()
        2.0
    """
    return kl(log_p, log_mixture(log_p, log_q, alpha))


class Replay(Run):
    r"""Which text a step learns from: given, freshly written, or written some time ago.

    Args:
        method: its settings.
        steps: $T$, of the whole training.
        unseen: `[rows, time + 1]`, text whose loss steers the share; None takes the first batch.
    """

    def __init__(self, method: DistiLLM, steps: int, unseen: Tensor | None) -> None:
        super().__init__(method)
        self.settings, self.steps, self.unseen = method, steps, unseen
        self.share, self.done, self.reference = method.share, 0, float("nan")
        self.buffer: deque[Tensor] = deque(maxlen=method.capacity)

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of the next step."""
        if self.unseen is None:
            self.unseen = batch
        if self.done * LOOKS % self.steps < LOOKS:  # 20 times, or in each of fewer steps
            self.look(unseen_loss(student, self.unseen))
        self.done += 1
        return self.settings.objective(student, teacher, self.sequences(batch, student, generator))

    def look(self, loss: float) -> None:
        """Let the share rise if the loss has risen by the tolerance since it last did, or since the start."""
        if self.done == 0:
            self.reference = loss
        elif loss >= self.reference + self.settings.tolerance:
            self.share, self.reference = min(self.share + RISE, 1.0), loss

    def sequences(self, batch: Tensor, student: nn.Module, generator: torch.Generator) -> Sequences:
        r"""With chance $1 - \phi$ the batch; with $\phi (1 - t/T)$ fresh text; else text from the buffer, if it is full.

        Raises:
            ValueError: a buffer smaller than a batch.
        """
        drawn = float(torch.rand((), generator=generator, device=generator.device))
        if drawn >= self.share:
            return Sequences(batch)
        if self.settings.capacity < len(batch):
            raise ValueError(f"capacity={self.settings.capacity} must hold a batch, {len(batch)} sequences")
        if drawn < self.share * (1 - self.done / self.steps) or len(self.buffer) < self.settings.capacity:
            fresh = continued(batch, self.settings.prompt, [(1.0, student)], generator)
            self.buffer.extend(fresh.tokens)
            return fresh
        rows = torch.randperm(len(self.buffer), generator=generator, device=generator.device)[: len(batch)]
        tokens = torch.stack([self.buffer[row] for row in rows.tolist()])
        return Sequences(tokens, written_mask(tokens, self.settings.prompt))


@torch.no_grad()
def unseen_loss(student: nn.Module, tokens: Tensor) -> float:
    """Cross-entropy of `[rows, time + 1]` tokens, in nats, read in evaluation mode."""
    training = student.training
    student.eval()
    loss = float(label_loss(logits_of(student, tokens[:, :-1]), tokens[:, 1:]))
    student.train(training)
    return loss
