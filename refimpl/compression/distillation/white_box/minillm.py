r"""MiniLLM: the reverse divergence of whole responses, by a policy gradient with three measures against its variance.

Source: `minillm` (arXiv 2306.08543), Eqs. (1) to (7), Section 2.2 and Algorithm 1; official code
microsoft/LMOps@48fca1acc61ffa20ebb7c31c74a1d8e33499b476, `minillm/minillm/{losses,sampler,trainer}.py` and
`minillm/scripts/gpt2/minillm/train_base_xl.sh`.

Differs from the paper: windows of plain text have no prompt, so the first part of a window stands for one. Losses are means
over tokens and not sums over a response, as in the official code. The exact part has no weight $w_t$, as there: it does not
depend on $y_t$, over which $w_t$ averages to 1. The rewards to come are divided by their number, T - t; Eq. (6) has one
less, which is 0 one token before the end. Where rewards are negative, clipping is PPO's (the larger of the two losses), as
in the official code.

Not here: of the official code, a discount (its default is 0.95), whitened and scaled rewards, this token's reward a second
time in the sampled part, several updates on one set of responses, and a distillation term on the pre-training text; none of
these is in the paper. Also not: a text of its own for the pre-training loss (it takes the batch), nor an end of text.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.distillation.divergence import kl, log_mixture
from refimpl.compression.distillation.protocol import (
    Sequences,
    WhiteBox,
    check_logits,
    counted,
    label_loss,
    logits_of,
)
from refimpl.compression.distillation.sampling import check_prompt, continued


@dataclass(frozen=True, kw_only=True)
class MiniLLM(WhiteBox):
    r"""Three losses: this token's reverse divergence, exact; what comes after it, sampled; and plain training on the text.

    Args:
        alpha: $\alpha$, the teacher's share in the mixture that responses are drawn from, in [0, 1).
        length_norm: whether rewards to come are averaged over the tokens to come, and not summed.
        clip: $\epsilon$, how far the ratio of chances may be from 1 before its gradient is cut; None never cuts.
        text: weight of plain training on the batch; the paper's is 1.
        prompt: share of a window that stands for the prompt; ours.

    Examples:
        >>> logits, labels = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([2])
        >>> MiniLLM().loss(logits, logits, labels).item()
        0.0
    """

    alpha: float = 0.2
    length_norm: bool = True
    clip: float | None = 0.2
    text: float = 1.0
    prompt: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must be in [0, 1), the teacher's share; 0.2 is the paper's")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip} must be in (0, 1), or None for no clipping; 0.2 is the official code's")
        if not 0 <= self.text < float("inf"):
            raise ValueError(f"text={self.text} must be 0 (no plain training) or above; 1 is the paper's")
        check_prompt(self.prompt)

    def sequences(self, batch: Tensor, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> Sequences:
        r"""Responses drawn token by token from $\tilde p = \alpha p + (1 - \alpha) q$ (Eq. 4)."""
        models = [(self.alpha, teacher), (1 - self.alpha, student)]
        return continued(batch, self.prompt, models if self.alpha else models[1:], generator)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        r"""The exact part (Eq. 3): mean $\mathrm{KL}(q \,\|\, p)$ of the next token, over the positions that count.

        Its gradient is that of $-\mathbb{E}_{y_t \sim q}[r_t]$, a sum over the vocabulary.

        Args:
            student_logits: `[..., vocabulary]`.
            teacher_logits: the same shape; no gradient reaches them.
            labels: `[...]`; checked, but nothing depends on them.
            mask: `[...]`, True where a position counts; None counts all.

        Raises:
            ValueError: shapes do not fit, or no position counts.
        """
        check_logits(student_logits, teacher_logits, labels, mask)
        log_q = counted(student_logits, mask).log_softmax(-1)
        return kl(log_q, counted(teacher_logits.detach(), mask).log_softmax(-1)).mean()

    def objective(self, student: nn.Module, teacher: nn.Module, given: Sequences) -> Tensor:
        """The exact part and the sampled part over responses that `sequences` has just drawn from these models."""
        inputs, drawn = given.tokens[:, :-1], given.tokens[:, 1:]
        with torch.no_grad():
            teacher_logits = logits_of(teacher, inputs)
        logits = logits_of(student, inputs)
        exact = self.loss(logits, teacher_logits, drawn, given.mask)
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_q, log_p = (
            x.to(wide).log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1) for x in (logits, teacher_logits)
        )
        mask = torch.ones_like(drawn, dtype=torch.bool) if given.mask is None else given.mask
        sampled = policy_loss(log_q, log_p, mask, alpha=self.alpha, length_norm=self.length_norm, clip=self.clip)
        return exact + sampled

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step: that of fresh responses, and plain training on the batch (Algorithm 1)."""
        total = super().step(student, teacher, batch, generator)
        if self.text > 0:
            total = total + self.text * label_loss(logits_of(student, batch[:, :-1]), batch[:, 1:])
        return total


def policy_loss(
    log_q: Tensor, log_p: Tensor, mask: Tensor, *, alpha: float, length_norm: bool, clip: float | None
) -> Tensor:
    r"""The sampled part: a scalar with the gradient $-\operatorname{mean}_t w_t R_{t+1} \nabla \log q_t$ (Eqs. 5 to 7).

    The weight is $w_t = q_t / \tilde p_t$ of this token alone, for the draws came from
    $\tilde p = \alpha p + (1 - \alpha) q$.

    Args:
        log_q: `[batch, time]`, the student's log-chance of each drawn token; the gradient reaches it.
        log_p: the same shape, the teacher's.
        mask: the same shape, True where a token was drawn.
        alpha: the teacher's share in the draws.
        length_norm: whether rewards to come are averaged.
        clip: as of `MiniLLM`.
    """
    now = log_q.detach()
    to_come = rewards_to_come((log_p.detach() - now).masked_fill(~mask, 0), mask, length_norm=length_norm)
    ratio = (log_q - log_mixture(log_p.detach(), now, alpha)).exp()
    loss = -to_come * ratio
    if clip is not None:
        loss = torch.maximum(loss, -to_come * ratio.clamp(1 - clip, 1 + clip))
    return loss[mask].mean()


def rewards_to_come(rewards: Tensor, mask: Tensor, *, length_norm: bool) -> Tensor:
    r"""$R_{t+1} = \sum_{t' > t} r_{t'}$, or its mean over the tokens to come (Eq. 6); 0 at the last one.

    Args:
        rewards: $r_t = \log p_t - \log q_t$, `[batch, time]`, 0 where mask is False.
        mask: `[batch, time]`, True where a token was drawn.
        length_norm: whether to average.

    Returns:
        `[batch, time]`.

    Examples:
        >>> rewards, mask = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[False, True, True, True]])
        >>> rewards_to_come(rewards, mask, length_norm=False).tolist()
        [[7.0, 6.0, 4.0, 0.0]]
        >>> rewards_to_come(rewards, mask, length_norm=True)[:, 1:].tolist()
        [[3.0, 4.0, 0.0]]
    """
    total = _after(rewards)
    return total / _after(mask.to(rewards.dtype)).clamp(min=1) if length_norm else total


def _after(x: Tensor) -> Tensor:
    """Sum of what follows each position of `[batch, time]`."""
    return F.pad(x.flip(1).cumsum(1).flip(1)[:, 1:], (0, 1))
