r"""Knowledge distillation: the student learns the teacher's softened distribution, and the labels beside it.

Source: `knowledge-distillation` (arXiv 1503.02531), Section 2, Eqs. (1), (2) and (4), and Section 4.1 for the defaults; the
authors published no code.

Differs from the paper: the first term is a divergence and not a cross-entropy, so that it is 0 where the student has learnt
all; they differ by the teacher's entropy, which no gradient sees. The two weights are normalized to 1.

Not here: an ensemble as the teacher (average its distributions, and pass their logarithm as logits); the specialists of
Section 5; logits stored beforehand; a student that gives a token no chance at all (a logit of minus infinity), as a teacher may.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.distillation.protocol import WhiteBox, check_logits, counted, label_loss


@dataclass(frozen=True, kw_only=True)
class HintonKD(WhiteBox):
    r"""$L = \alpha T^2\, \mathrm{KL}(p \,\|\, q) + (1 - \alpha)\, \mathrm{CE}(y, \operatorname{softmax}(z))$.

    Args:
        temperature: $T$, by which both models' logits are divided in the first term; 2 was best in the paper's speech models.
        alpha: weight of the first term, 0 (labels only) to 1 (teacher only). The paper weighs the labels 0.5 against 1, which
            is 2/3 here.

    Examples:
        >>> logits, labels = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([2])
        >>> HintonKD(alpha=1.0).loss(logits, logits, labels).item()
        0.0
    """

    temperature: float = 2.0
    alpha: float = 2 / 3

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0; the paper tries 1, 2, 5 and 10")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be in [0, 1], the teacher's share; 2/3 is the paper's")

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean over the positions that count, a scalar in float32 at least.

        Args:
            student_logits: `[..., vocabulary]`.
            teacher_logits: the same shape; no gradient reaches them.
            labels: `[...]`, the tokens that really follow.
            mask: `[...]`, True where a position counts; None counts all.

        Raises:
            ValueError: shapes do not fit, or no position counts.
        """
        check_logits(student_logits, teacher_logits, labels, mask)
        total = student_logits.new_zeros((), dtype=torch.promote_types(student_logits.dtype, torch.float32))
        if self.alpha > 0:
            divergence = soft_divergence(
                counted(student_logits, mask), counted(teacher_logits.detach(), mask), self.temperature
            )
            total = total + self.alpha * self.temperature**2 * divergence.mean()
        if self.alpha < 1:
            total = total + (1 - self.alpha) * label_loss(student_logits, labels, mask)
        return total


def soft_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""$\mathrm{KL}(p \,\|\, q)$ of the distributions softened by T (Eq. 1).

    Its gradient is $(q_i - p_i)/T$ (Eq. 2), which for a high T and centred logits tends to $(z_i - v_i)/(N T^2)$ (Eq. 4).

    Args:
        student_logits: $z$, `[..., vocabulary]`.
        teacher_logits: $v$, the same shape.
        temperature: $T$.

    Returns:
        `[...]`, in nats, 0 or more up to rounding.
    """
    log_q = (student_logits / temperature).log_softmax(dim=-1)
    log_p = (teacher_logits / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 log 0 is 0
    divergence: Tensor = torch.linalg.vecdot(p, finite) - torch.linalg.vecdot(p, log_q)
    return divergence
