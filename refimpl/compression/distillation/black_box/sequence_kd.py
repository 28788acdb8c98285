r"""Sequence-level distillation: the student is trained on what a beam search makes the teacher write.

Source: `sequence-kd` (arXiv 1606.07947), Section 3.2 (Seq-KD) and Section 3.3 (Seq-Inter); official code
harvardnlp/seq2seq-attn@2d36b4348dad5a18571495feacddcf8c6620a678, `s2sa/beam.lua` (`-beam 5`, and `-rescore bleu` for Seq-Inter)
and `s2sa/scorers/bleu.lua`.

Differs from the paper: windows of plain text have no source sentence, so the first part of a window stands for it, and the
rest for the human reference. The teacher writes at each step and not once beforehand, which gives the same text. In Seq-Inter,
among equally similar texts the likeliest is taken.

Not here: the distillation of single words beside it (`hinton-kd`, which needs logits); an end of text; Seq-Inter as the
fine-tuning of a student that Seq-KD trained, for which `distill` is called twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.black_box.overlap import sentence_bleu
from refimpl.compression.distillation.protocol import BlackBox, Sequences, Write
from refimpl.compression.distillation.sampling import check_prompt, kept_tokens, written_mask


@dataclass(frozen=True, kw_only=True)
class SequenceKD(BlackBox):
    r"""$L = -\log q(\hat y \mid x)$ with $\hat y$ the teacher's likeliest text, or the one of its best that is nearest the human's.

    Args:
        beams: $K$, width of the beam search.
        interpolate: whether to take, of the $K$ texts, the one most similar to the reference (Seq-Inter), and not the likeliest.
        prompt: share of a window that stands for the source; ours.

    Examples:
        >>> def write(prompts, n, *, temperature=0.0, beams=None):
        ...     return torch.tensor([[[3, 3], [5, 6]]])
        >>> batch, generator = torch.tensor([[1, 2, 5, 6]]), torch.Generator()
        >>> SequenceKD().sequences(batch, nn.Identity(), write, generator).tokens.tolist()
        [[1, 2, 3, 3]]
        >>> SequenceKD(interpolate=True).sequences(batch, nn.Identity(), write, generator).tokens.tolist()
        [[1, 2, 5, 6]]
    """

    beams: int = 5
    interpolate: bool = False
    prompt: float = 0.5

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams={self.beams} must be at least 1; the paper uses 5")
        check_prompt(self.prompt)

    def sequences(
        self,
        batch: Tensor,
        student: nn.Module,  # noqa: ARG002 - it has no say in what is written
        write: Write,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Sequences:
        """The first part of each row, and what the teacher writes after it, which alone counts.

        Args:
            batch: `[batch, time + 1]` tokens: source and reference.
            student: not looked at.
            write: the teacher's beam search.
            generator: not drawn from.
        """
        kept = kept_tokens(batch.shape[1], self.prompt)
        candidates = write(batch[:, :kept], batch.shape[1] - kept, beams=self.beams)  # [b, k, n]
        chosen = nearest(candidates, batch[:, kept:]) if self.interpolate else candidates[:, 0]
        tokens = torch.cat((batch[:, :kept], chosen), dim=1)
        return Sequences(tokens, written_mask(tokens, self.prompt))


def nearest(candidates: Tensor, references: Tensor) -> Tensor:
    r"""$\tilde y = \operatorname{argmax}_{y \in T_K} \operatorname{sim}(y, y_{\text{human}})$, by smoothed BLEU (Section 3.3).

    Args:
        candidates: $T_K$, `[batch, beams, n]`, likeliest first.
        references: `[batch, n]`.

    Returns:
        `[batch, n]`, one candidate of each row.

    Examples:
        >>> nearest(torch.tensor([[[1, 2, 3], [4, 5, 7]]]), torch.tensor([[4, 5, 6]])).tolist()
        [[4, 5, 7]]
    """
    scores = [
        [sentence_bleu(text, reference) for text in texts]
        for texts, reference in zip(candidates.tolist(), references.tolist(), strict=True)
    ]
    best = torch.tensor([row.index(max(row)) for row in scores], device=candidates.device)
    return candidates[torch.arange(len(best), device=best.device), best]
