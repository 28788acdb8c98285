r"""Generalized Knowledge Distillation: the teacher comments on what the student writes, under a divergence of choice.

Source: `gkd` (arXiv 2306.13649), Eq. (1) for the divergence, Section 3 and Algorithm 1; the authors published no code. The
direction of $\beta$ was held against huggingface/trl@7310b81fbd40177a60078ea26122c9fec5b092b8,
`trl/experimental/gkd/gkd_trainer.py`, whose $\beta = 0$ and 1 are the divergences that we name.

Differs from the paper: windows of plain text have no prompt, so the first part of a window stands for one where the student
writes; a window as it is counts as a whole. The mean is over tokens, as in TRL, and not over sequences.

Not here: a reward beside the divergence (Section 3.2); text that the teacher wrote (`sequence-kd`); greedy decoding.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.divergence import kl, log_mixture
from refimpl.compression.distillation.protocol import Sequences, WhiteBox, check_logits, counted
from refimpl.compression.distillation.sampling import check_prompt, continued

Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True, kw_only=True)
class GKD(WhiteBox):
    r"""A divergence of teacher $p$ and student $q$ at each token of given or, in a share $\lambda$ of the steps, own text.

    Args:
        share: $\lambda$, the chance that a step learns from what the student writes, 0 (given text only) to 1 (own text only);
            the paper studies 0, 0.5 and 1.
        divergence: `forward` is KL(p || q), `reverse` is KL(q || p), `jsd` lies between.
        beta: $\beta$ of `jsd`, in (0, 1): near 0 it acts as `forward`, near 1 as `reverse`; the paper tries 0.1, 0.5 and 0.9.
        prompt: share of a window that is kept where the student writes the rest; ours.

    Examples:
        >>> logits, labels = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([2])
        >>> GKD(divergence="reverse").loss(logits, logits, labels).item()
        0.0
    """

    share: float = 0.5
    divergence: Divergence = "jsd"
    beta: float = 0.5
    prompt: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be in [0, 1], the share of steps on the student's own text")
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence={self.divergence!r} must be one of {', '.join(get_args(Divergence))}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must be in (0, 1); divergence='forward' or 'reverse' are its ends")
        check_prompt(self.prompt)

    def sequences(
        self,
        batch: Tensor,
        student: nn.Module,
        teacher: nn.Module,  # noqa: ARG002 - it comments, and does not write
        generator: torch.Generator,
    ) -> Sequences:
        """The batch, or with chance `share` what the student makes of its beginnings; no gradient runs through the draws."""
        if float(torch.rand((), generator=generator, device=generator.device)) >= self.share:
            return Sequences(batch)
        return continued(batch, self.prompt, [(1.0, student)], generator)

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
        if self.divergence == "jsd":
            return generalized_jsd(log_p, log_q, self.beta).mean()
        return (kl(log_p, log_q) if self.divergence == "forward" else kl(log_q, log_p)).mean()


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    r"""$\beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m)$ with $m = \beta p + (1 - \beta) q$ (Eq. 1).

    Args:
        log_p: `[..., vocabulary]`, the teacher's log-probabilities.
        log_q: the same shape, the student's.
        beta: in (0, 1).

    Returns:
        `[...]`, in nats: at most the entropy of a coin that falls with chance beta, log 2 for 0.5.

    Examples:
        >>> apart = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> generalized_jsd(*apart, 0.5).exp().item()
        2.0
    """
    m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)
