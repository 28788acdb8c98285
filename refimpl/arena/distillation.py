r"""A small student learns from the testbed's model, and beside it one learns from the text alone: same start, same tokens.

The student is a decoder of two layers and width 96 with the teacher's vocabulary; it reads 400 batches of 8 windows of 128
tokens of the testbed's training text (12 batches of 4 x 64 in the quick form), drawn from the seed, as is its start. All learn
with AdamW at one learning rate that rises over the first tenth of the steps and falls to zero. Text that neither has seen gives
the figures, and after every eighth of the training (half, in the quick form) a point of the curve.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.compression.distillation.protocol import Distillation, distill, label_loss, logits_of
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import perplexity, windows

STEPS, BATCH, LENGTH, RATE = 400, 8, 128, 3e-3
QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH = 12, 4, 64
TEXT, QUICK_TEXT = 400_000, 50_000  # tokens that batches are cut from
UNSEEN = (
    16_384  # tokens that the figures are measured on; an eighth of them for a point of the curve and in the quick form
)

ABOUT = (
    "A decoder of two layers learns from the testbed's model on 410,000 tokens of real text: perplexity on text that neither has "
    "seen, distance from the teacher, and time, against the same student trained on the same tokens alone."
)
VERSION = 1
METRICS = (
    Metric("perplexity", "on unseen text", "lower"),
    Metric("divergence", "nats a token, from teacher to student", "lower"),
    Metric("agreement", "share of positions with the teacher's likeliest token", "higher"),
    Metric("seconds", "seconds of training", "lower", exact=False),
)
BASELINE = "training alone"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


class Alone(Distillation):
    """Training without a teacher: what the methods are held against."""

    def step(self, student: nn.Module, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Mean cross-entropy of the batch."""
        return label_loss(logits_of(student, batch[:, :-1]), batch[:, 1:])


def baseline(conditions: Conditions) -> dict[str, float]:
    """The student trained alone."""
    return _figures(Alone(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return _figures(implementation(**settings), conditions)


def student_of(teacher: Decoder, generator: torch.Generator) -> Decoder:
    """A fresh student: two layers of width 96, the teacher's vocabulary and context."""
    config = Config(
        vocabulary=teacher.config.vocabulary,
        d_model=96,
        n_layers=2,
        n_heads=3,
        n_kv_heads=1,
        head_dim=32,
        d_ff=256,
        tied_embeddings=True,
        max_positions=teacher.config.max_positions,
    )
    return initialize_(Decoder(config), generator)


def _figures(method: Distillation, conditions: Conditions) -> dict[str, float]:
    generator, device = conditions.generator, conditions.device
    given = testbed.subject(conditions.model, device)
    steps, batch, length = (QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH) if conditions.quick else (STEPS, BATCH, LENGTH)
    student = student_of(given.model, generator).to(device)
    drawn = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
    text = (
        rows.to(device)
        for rows in windows(given.text("train", QUICK_TEXT if conditions.quick else TEXT), batch, length, generator)
    )
    unseen = given.text("held-out", UNSEEN // 8 if conditions.quick else UNSEEN).to(device)
    points = 2 if conditions.quick else 8
    curve, aside = list[tuple[float, float]](), [0.0]
    conditions.curves["unseen text's loss in nats over tokens"] = curve

    def watch(done: int) -> None:
        if done % (steps // points) == 0:
            start = clock(device)
            curve.append((done * batch * length, math.log(perplexity(student, unseen[: UNSEEN // 8], length))))
            aside[0] += clock(device) - start

    start = clock(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    distill(student, given.model, method, optimizer, text, steps, drawn, schedule=_schedule, after=watch)
    seconds = clock(device) - start - aside[0]
    loss, divergence, agreement = _compare(student, given.model, unseen, length)
    return {"perplexity": math.exp(loss), "divergence": divergence, "agreement": agreement, "seconds": seconds}


def _schedule(progress: float) -> float:
    """Up over a tenth of the steps, from a tenth of the rate, then down to zero along a cosine."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


@torch.no_grad()
def _compare(student: nn.Module, teacher: nn.Module, tokens: Tensor, length: int) -> tuple[float, float, float]:
    """Student's loss in nats, divergence from the teacher in nats, share of positions where their likeliest tokens agree."""
    training = student.training
    student.eval()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for rows in torch.split(tokens[: len(tokens) // length * length].view(-1, length), 8):
        log_q, log_p = (logits_of(model, rows[:, :-1]).float().log_softmax(-1) for model in (student, teacher))
        sums[0] -= log_q.gather(2, rows[:, 1:, None]).sum().cpu()
        sums[1] += (log_p.exp() * (log_p - log_q)).sum().cpu()
        sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().cpu()
        count += rows[:, 1:].numel()
    student.train(training)
    loss, divergence, agreement = (sums / count).tolist()
    return loss, divergence, agreement
