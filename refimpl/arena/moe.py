r"""Mixtures of experts beside a dense feed-forward, at equal computation for a token: loss, balance, cost.

A decoder of two layers and width 64 is trained from the seed on the testbed's text, windows of 64 tokens. Its second feed-forward
is a mixture whose experts each have the shape of the dense one, so that a token's own computation is that of the dense model
wherever it goes to one expert. Loss is that of held-out text, in evaluation mode; load and drops are those of the training's
last tenth, counted before the update, at the layer's capacity in training.
"""

import statistics
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.architecture.moe.decoder import mixtures, replace_feed_forward, take_auxiliary_loss
from refimpl.architecture.moe.protocol import MixtureOfExperts
from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import next_token_loss, train, windows
from refimpl.testbed import corpus
from refimpl.testbed.tokenizer import VOCABULARY

LENGTH, BATCH, RATE = 64, 16, 4e-3
STEPS, QUICK_STEPS = 600, 60
TRAIN, HELD_OUT = 200_000, 16_384  # tokens

ABOUT = (
    "A two-layer decoder of width 64 trained on real text, its second feed-forward a mixture whose experts have the dense "
    "one's shape: loss at equal tokens, balance of the experts, share of tokens dropped, parameters, seconds for a step."
)
VERSION = 1
METRICS = (
    Metric("loss", "nats a token of held-out text", "lower"),
    Metric("fullest_expert", "times the mean demand", "lower"),
    Metric("dropped", "share of tokens", "lower"),
    Metric("parameters", "parameters", "neither"),
    Metric("active_parameters", "parameters that a token meets, on average", "lower"),
    Metric("seconds_per_step", "seconds", "lower", exact=False),
)
BASELINE = "dense feed-forward"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def baseline(conditions: Conditions) -> dict[str, float]:
    """The dense feed-forward in both layers."""
    return figures(None, conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return figures(implementation(**settings), conditions)


def text(conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Tokens to train on and held-out ones; a quarter of them in the quick form."""
    share = 4 if conditions.quick else 1
    given = corpus.tokens("train", TRAIN // share), corpus.tokens("held-out", HELD_OUT // share)
    return given[0].to(conditions.device), given[1].to(conditions.device)


def figures(method: MixtureOfExperts | None, conditions: Conditions) -> dict[str, float]:
    """Train a decoder, dense if there is no method, and measure it; adds the curve `loss over tokens`."""
    takes_no_model(conditions)
    seed = int(torch.randint(2**31, (), generator=conditions.generator))
    generator = torch.Generator().manual_seed(seed)
    model = initialize_(Decoder(shape()), generator)
    if method is not None:
        replace_feed_forward(model, method, every=2, generator=generator)
    model = model.to(conditions.device)
    for layer in mixtures(model):
        layer.generator = torch.Generator(conditions.device).manual_seed(seed)
    steps = QUICK_STEPS if conditions.quick else STEPS
    tokens, held_out = text(conditions)
    records, seconds, losses, tenth = Records(), [], [], max(1, steps // 10)

    def loss(decoder: nn.Module, batch: Tensor) -> Tensor:
        value = next_token_loss(decoder, batch)
        losses.append(value.item())
        seconds.append(clock(conditions.device))
        if method is None:
            return value
        if len(losses) > steps - tenth:
            records.take(decoder)
        return value + take_auxiliary_loss(decoder)

    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    batches = windows(tokens, BATCH, LENGTH, generator)
    train(model, optimizer, batches, steps, loss=loss, schedule=warm_and_decay)
    ends = range(tenth, steps + 1, tenth)
    conditions.curves["loss over tokens"] = [
        (end * BATCH * LENGTH, statistics.mean(losses[end - tenth : end])) for end in ends
    ]
    total, experts, used = counts(model, records)
    return {
        "loss": held_out_loss(model, held_out),
        "fullest_expert": records.fullest,
        "dropped": records.dropped,
        "parameters": total,
        "active_parameters": total - experts + used,
        "seconds_per_step": statistics.median(b - a for a, b in pairwise(seconds)),
    }


def shape() -> Config:
    """The dense decoder's."""
    return Config(
        vocabulary=VOCABULARY,
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=192,
        tied_embeddings=True,
    )


class Records:
    """What routings of the last steps add up to; a dense layer is one expert that takes all."""

    def __init__(self) -> None:
        self.demand: list[Tensor] = []
        self.served, self.tokens, self.lost = 0, 0, 0

    def take(self, model: nn.Module) -> None:
        """Add the last call's routings."""
        for layer in mixtures(model):
            if layer.routing is not None:
                self.demand.append(layer.routing.demand.float())
                self.served += int(layer.routing.served.sum())
                self.lost += int(layer.routing.dropped.sum())
                self.tokens += layer.routing.dropped.numel()

    @property
    def fullest(self) -> float:
        """Demand for the most wanted expert over the mean, of each call and layer, on average."""
        return statistics.mean(float(d.max() / d.mean()) for d in self.demand) if self.demand else 1.0

    @property
    def dropped(self) -> float:
        """Share of tokens that no expert took."""
        return self.lost / self.tokens if self.tokens else 0.0


def counts(model: Decoder, records: Records) -> tuple[int, int, float]:
    """Parameters: all, those of experts, and how many of these a token meets on average."""
    experts = [sum(p.numel() for p in layer.moe.experts.parameters()) for layer in mixtures(model)]
    one = sum(n / layer.moe.experts.n_experts for n, layer in zip(experts, mixtures(model), strict=True))
    met = records.served / records.tokens if records.tokens else 0.0
    return sum(p.numel() for p in model.parameters()), sum(experts), one * met


def warm_and_decay(progress: float) -> float:
    """Learning rate's factor: up over the first tenth, then down to zero."""
    return min(1.0, 10 * progress + 0.05) * (1 - progress)


@torch.no_grad()
def held_out_loss(model: Decoder, tokens: Tensor) -> float:
    """Nats a token, in windows of the trained length that are read on their own."""
    model.eval()
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    total = sum(float(next_token_loss(model, part)) * len(part) for part in torch.split(rows, BATCH))
    return total / len(rows)
