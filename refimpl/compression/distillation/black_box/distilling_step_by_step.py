r"""Distilling Step-by-Step: the student learns the teacher's rationales as a second task, beside the labels.

Source: `distilling-step-by-step` (arXiv 2305.02301), Section 3.1 for the rationales and Section 3.2 for the two tasks and their
loss; official code google-research/distilling-step-by-step@ef944263c9ddfd40a9888557f3e7d17513fd1a7e, `data_utils.py` (how a
text is taken apart), `run.py` (prefixes, defaults) and `model_utils.py` (the loss).

Differs from the paper: the student is a decoder, so that input and target are one sequence of which the target counts. The
official loss is $\alpha L_{label} + (1 - \alpha) L_{rationale}$ with $\alpha = 0.5$: half of ours at $\lambda = 1$. A text of the
teacher that can't be taken apart gives no rationale; the official code trains on a blank. In windows of plain text, which ask
nothing, the first part of a window is the input, what follows in it the label, and what the teacher writes there the rationale.

Not here: options of a question, "(b) tea", of which the official code takes the text; an encoder beside the decoder.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.protocol import BlackBox, Sequences, Write, label_loss, logits_of
from refimpl.compression.distillation.sampling import check_prompt, kept_tokens

MARKER = "So the answer is"


@dataclass(frozen=True)
class Example:
    """A question, why its answer is right, and the answer; without a rationale it is empty."""

    question: str
    rationale: str
    label: str


@dataclass(frozen=True, kw_only=True)
class DistillingStepByStep(BlackBox):
    r"""$L = L_{label} + \lambda L_{rationale}$, each a mean cross-entropy; a prefix of the input tells the tasks apart.

    At test time the label's prefix stands before the input, and no rationale is written.

    Args:
        weight: $\lambda$, 0 (labels only) or above; 1 is the paper's.
        label_prefix: tokens before the input whose label is asked for, `[label]` in the paper; empty is possible.
        rationale_prefix: tokens before the input whose rationale is asked for, `[rationale]` in the paper.
        prompt: share of a window of plain text that is its input; ours.

    Examples:
        >>> rows = DistillingStepByStep().rows([[7, 8]], labels=[[3]], rationales=[[5, 6]])
        >>> rows.tokens.tolist(), rows.mask.int().tolist()
        ([[0, 7, 8, 3, 0], [1, 7, 8, 5, 6]], [[0, 0, 1, 0], [0, 0, 1, 1]])
    """

    weight: float = 1.0
    label_prefix: Sequence[int] = (0,)
    rationale_prefix: Sequence[int] = (1,)
    prompt: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_prefix", tuple(self.label_prefix))
        object.__setattr__(self, "rationale_prefix", tuple(self.rationale_prefix))
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} must be 0 (labels only) or above; 1 is the paper's")
        if self.label_prefix == self.rationale_prefix:
            raise ValueError(
                f"label_prefix={self.label_prefix} must not be rationale_prefix: it tells the student what is asked for"
            )
        check_prompt(self.prompt)

    def sequences(
        self,
        batch: Tensor,
        student: nn.Module,  # noqa: ARG002 - it has no say in what is written
        write: Write,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Sequences:
        """Both tasks of windows of plain text `[batch, time + 1]`: see `rows`."""
        kept = kept_tokens(batch.shape[1], self.prompt)
        inputs, labels = batch[:, :kept], batch[:, kept:]
        rationales = write(inputs, labels.shape[1])
        rows = self.rows(inputs.tolist(), labels=labels.tolist(), rationales=rationales.tolist())
        return Sequences(rows.tokens.to(batch.device), rows.mask.to(batch.device) if rows.mask is not None else None)

    def rows(
        self, inputs: Sequence[Sequence[int]], *, labels: Sequence[Sequence[int]], rationales: Sequence[Sequence[int]]
    ) -> Sequences:
        """Examples in tokens as what the student reads: first all of the label's task, then all of the rationale's.

        Args:
            inputs: tokens of each question, the demonstrations left out.
            labels: tokens of each label.
            rationales: tokens of each rationale; an empty one counts nowhere.

        Returns:
            Tokens `[2 * examples, longest]`, padded at the right by 0, and a mask that counts the targets.

        Raises:
            ValueError: no examples, as many labels or rationales as are not inputs, or a task without anything before its target.
        """
        if not inputs or not len(inputs) == len(labels) == len(rationales):
            raise ValueError(
                f"{len(inputs)} inputs, {len(labels)} labels, {len(rationales)} rationales: as many of each"
            )
        heads = [[*prefix, *x] for prefix in (self.label_prefix, self.rationale_prefix) for x in inputs]
        if not all(heads):
            raise ValueError("an empty input without a prefix: nothing stands before its label")
        targets = [*labels, *rationales]
        longest = max(len(head) + len(target) for head, target in zip(heads, targets, strict=True))
        tokens = torch.zeros(len(heads), longest, dtype=torch.int64)
        mask = torch.zeros(len(heads), longest - 1, dtype=torch.bool)
        for row, (head, target) in enumerate(zip(heads, targets, strict=True)):
            end = len(head) + len(target)
            tokens[row, :end] = torch.tensor([*head, *target])
            mask[row, len(head) - 1 : end - 1] = True
        return Sequences(tokens, mask)

    def objective(self, student: nn.Module, given: Sequences) -> Tensor:
        r"""$L_{label} + \lambda L_{rationale}$ over rows as `rows` lays them out; a scalar, float32 at least.

        Raises:
            ValueError: no label counts.
        """
        if given.mask is None:
            raise ValueError("mask=None: without one the input would be learnt too; `rows` makes it")
        n = len(given.tokens) // 2
        logits, targets = logits_of(student, given.tokens[:, :-1]), given.tokens[:, 1:]
        if not bool(given.mask[:n].any()):
            raise ValueError("no label counts: each example needs one")
        loss = label_loss(logits[:n], targets[:n], given.mask[:n])
        if self.weight > 0 and bool(given.mask[n:].any()):
            loss = loss + self.weight * label_loss(logits[n:], targets[n:], given.mask[n:])
        return loss


def explained(
    questions: Iterable[str],
    ask: Callable[[str], str],
    demonstrations: Sequence[Example],
    *,
    labels: Iterable[str] | None = None,
    marker: str = MARKER,
) -> list[Example]:
    """What the teacher says to each question, and why: its answers to a few-shot prompt, taken apart.

    Args:
        questions: the inputs.
        ask: the teacher, prompt to text.
        demonstrations: examples that show how to explain; the paper writes about ten for a task.
        labels: the right answers, which replace the teacher's where there are any.
        marker: the words between rationale and label.

    Returns:
        An example a question. Where the teacher's text can't be taken apart, its rationale is empty; so, and without a right
        answer either, the question is left out.

    Examples:
        >>> shown = [Example("2 + 2 + 1", "2 + 2 = 4, 4 + 1 = 5.", "5")]
        >>> explained(["1 + 1 + 1"], lambda prompt: " 1 + 1 = 2, 2 + 1 = 3. So the answer is 3.", shown)
        [Example(question='1 + 1 + 1', rationale='1 + 1 = 2, 2 + 1 = 3.', label='3')]
    """
    found = []
    asked = list(questions)
    right = [None] * len(asked) if labels is None else list(labels)
    for question, label in zip(asked, right, strict=True):
        parts = taken_apart(ask(few_shot(question, demonstrations, marker)), marker)
        if parts is not None:
            found.append(Example(question, parts[0], parts[1] if label is None else label))
        elif label is not None:
            found.append(Example(question, "", label))
    return found


def few_shot(question: str, demonstrations: Sequence[Example], marker: str = MARKER) -> str:
    """The prompt: examples with rationales, and the question.

    Examples:
        >>> print(few_shot("1 + 1", [Example("2 + 1", "2 and 1 more is 3.", "3")]))
        Q: 2 + 1
        A: 2 and 1 more is 3. So the answer is 3.
        <BLANKLINE>
        Q: 1 + 1
        A:
    """
    shown = [f"Q: {e.question}\nA: {e.rationale} {marker} {e.label}.\n\n" for e in demonstrations]
    return "".join(shown) + f"Q: {question}\nA:"


def taken_apart(text: str, marker: str = MARKER) -> tuple[str, str] | None:
    """Rationale and label in a text of the teacher; None where the marker is missing or stands twice, or nothing comes after.

    What the teacher writes after its answer, a question of its own, is cut off.

    Examples:
        >>> taken_apart(" 1 and 1 is 2. So the answer is 2. Q: And 3?")
        ('1 and 1 is 2.', '2')
        >>> taken_apart("2, of course.") is None
        True
    """
    parts = text.split("Q:")[0].split(marker)
    if len(parts) != 2:
        return None
    rationale, label = parts[0].strip(), parts[1].strip().removesuffix(".")
    return (rationale, label) if label else None
