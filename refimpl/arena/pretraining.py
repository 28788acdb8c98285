r"""A small decoder is trained from nothing: what loss does it reach at equal tokens, and at equal seconds?

The substrate is the testbed's text in 2,048 tokens and a decoder of three layers of width 96. The seed draws the weights and the
order of the text, alike for all methods. A training is made of four parts, and a method brings the one that its field `part`
names; PyTorch's AdamW, float32, no growth and normal weights stand for the others. The learning rate rises over the first
steps and then stays, so that every point of a run can be compared; a method that grows a model spends the first quarter of the
tokens on the small one. *Equal seconds* are those that the baseline takes for all tokens here, by its speed measured in the
same cell; evaluation is not counted, and a faster method trains on with more tokens.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import FullPrecision, next_token_loss, train, windows
from refimpl.pretraining.protocol import Groups, parameter_groups, state_bytes

CONFIG = Config(
    vocabulary=2048, d_model=96, n_layers=3, n_heads=3, n_kv_heads=3, head_dim=32, d_ff=256, tied_embeddings=True
)
BATCH, LENGTH = 8, 64
STEPS, QUICK_STEPS, EVALUATIONS = 400, 10, 10
WARM_UP = 0.05  # share of the steps
SMALL_SHARE = 0.25  # share of the steps that a model which is grown spends small
LR, WEIGHT_DECAY = 3e-3, 0.1  # of the baseline, and of methods that set none
LONGEST = 20  # times the steps: where a method is that much faster, or the clock is off, the run ends all the same

ABOUT = (
    "A three-layer decoder of width 96 is trained on the testbed's text, 400 steps of 512 tokens: held-out loss at equal tokens "
    "and in the seconds that PyTorch's AdamW takes, bytes of state, and time of a step."
)
VERSION = 1
METRICS = (
    Metric("loss", "nats per held-out token at equal tokens", "lower"),
    Metric("loss_at_equal_seconds", "nats per held-out token in the baseline's time", "lower", exact=False),
    Metric("state_bytes", "bytes beside float32 weights and gradients", "lower"),
    Metric("seconds_per_step", "seconds", "lower", exact=False),
)
BASELINE = "AdamW of PyTorch"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


class Float32(FullPrecision):
    """The precision of who brings none."""

    nbytes = 0

    def start(self, model: Decoder) -> "Float32":  # noqa: ARG002 - the protocol passes it
        """Begin a training."""
        return self


class NormalWeights:
    """The initialization of who brings none."""

    def initialize(self, model: Decoder, generator: torch.Generator) -> Decoder:
        """Draw the weights, in place."""
        return initialize_(model, generator)

    def groups(self, model: Decoder, weight_decay: float) -> Groups:
        """Groups for the optimizer."""
        return parameter_groups(model, weight_decay)


class NoGrowth:
    """The growth of who brings none: the model is large from the start."""

    def small_config(self, config: Config) -> Config:
        """Shape of the model that is trained first."""
        return config

    def grow(self, small: Decoder, config: Config, batches: Iterator[Tensor], generator: torch.Generator) -> Decoder:  # noqa: ARG002
        """The model as it is."""
        return small


PARTS: dict[str, Any] = {
    "optimizer": partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.95)),
    "precision": Float32,
    "initialization": NormalWeights,
    "growth": NoGrowth,
}


def baseline(conditions: Conditions) -> dict[str, float]:
    """PyTorch's AdamW in float32."""
    return figures(PARTS, conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The part that `implementation` names, by its settings, in the place of the baseline's.

    Raises:
        ValueError: the implementation names no part of a training.
    """
    part = getattr(implementation, "part", None)
    if part not in PARTS:
        raise ValueError(f"{implementation.__name__}.part is {part!r}; it must be one of {', '.join(PARTS)}")
    return figures({**PARTS, part: partial(implementation, **settings)}, conditions)


@dataclass
class Run:
    """A training, its clock and what was seen on the way.

    Args:
        parts: a factory for each part.
        text: tokens to train on.
        held_out: `[batch, time + 1]`, to be evaluated on.
        seed: draws weights and order.
        steps: that make up the equal tokens.
        device: where to.
    """

    parts: Mapping[str, Any]
    text: Tensor
    held_out: Tensor
    seed: int
    steps: int
    device: torch.device
    step_seconds: list[float] = field(default_factory=list)
    seen: list[tuple[int, float, float]] = field(default_factory=list)  # steps, seconds, held-out loss
    state_bytes: int = 0

    def go(self, seconds: float = 0.0) -> "Run":
        """Train for `steps`, and on until the clock shows `seconds`."""
        drawn, order = (torch.Generator().manual_seed(self.seed + i) for i in range(2))
        batches = (batch.to(self.device) for batch in windows(self.text, BATCH, LENGTH, order))
        start, growth = self.parts["initialization"](), self.parts["growth"]()
        small = growth.small_config(CONFIG)
        model = start.initialize(Decoder(small), drawn).to(self.device)
        if small != CONFIG:
            self._stage(model, start.groups(model, self.decay), batches, int(SMALL_SHARE * self.steps), 0.0)
            before = clock(self.device)
            model = growth.grow(model, CONFIG, batches, drawn)
            self.step_seconds[-1] += clock(self.device) - before
        self._stage(model, start.groups(model, self.decay), batches, self.steps, seconds)
        return self

    @property
    def decay(self) -> float:
        """Weight decay of the groups that have one."""
        return float(getattr(self.parts["optimizer"], "keywords", {}).get("weight_decay", WEIGHT_DECAY))

    def _stage(self, model: Decoder, groups: Groups, batches: Iterator[Tensor], until: int, seconds: float) -> None:
        """Train one model until that many steps of the whole run are done and the clock shows `seconds`."""
        optimizer, session = self.parts["optimizer"](groups), self.parts["precision"]().start(model)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        limit, warm_up = LONGEST * self.steps, max(1, int(WARM_UP * self.steps))
        self.see(model)
        last = clock(self.device)

        def after(_: int) -> bool:
            nonlocal last
            self.step_seconds.append(clock(self.device) - last)
            done = len(self.step_seconds)
            finished = done >= until and sum(self.step_seconds) >= seconds
            if done % max(1, self.steps // EVALUATIONS) == 0 or finished:
                self.see(model)
            last = clock(self.device)
            return finished

        train(
            model,
            optimizer,
            batches,
            limit,
            schedule=lambda progress: min(1.0, (progress * limit + 1) / warm_up),
            precision=session,
            after=after,
        )
        self.state_bytes = max(self.state_bytes, state_bytes(optimizer) + session.nbytes)

    @torch.no_grad()
    def see(self, model: Decoder) -> None:
        """Note steps, seconds and held-out loss."""
        training = model.training
        loss = float(next_token_loss(model.eval(), self.held_out))
        model.train(training)
        self.seen.append((len(self.step_seconds), sum(self.step_seconds), loss))


def figures(parts: Mapping[str, Any], conditions: Conditions) -> dict[str, float]:
    """Train with these parts and measure; the clock's length is the baseline's speed here times the steps."""
    if conditions.model is not None:
        raise ValueError(f"--model {conditions.model}: this arena trains a model of its own; leave the option out")
    steps = QUICK_STEPS if conditions.quick else STEPS
    seed = int(torch.randint(2**31, (), generator=conditions.generator))
    text, held_out = corpus(steps)
    run = partial(Run, text=text, held_out=held_out.to(conditions.device), seed=seed, device=conditions.device)
    speed = statistics.median(run(PARTS, steps=6).go().step_seconds[1:])
    done = run(parts, steps=steps).go(seconds=steps * speed)
    conditions.curves["held-out loss over tokens"] = [(n * BATCH * LENGTH, loss) for n, _, loss in done.seen]
    conditions.curves["held-out loss over seconds"] = [(seconds, loss) for _, seconds, loss in done.seen]
    return {
        "loss": at(steps, [(n, loss) for n, _, loss in done.seen]),
        "loss_at_equal_seconds": at(steps * speed, [(seconds, loss) for _, seconds, loss in done.seen]),
        "state_bytes": done.state_bytes,
        "seconds_per_step": statistics.median(done.step_seconds),
    }


def corpus(steps: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on, about twice as many as the steps take, and held-out windows `[32, time + 1]`."""
    train_on = testbed.corpus.tokens("train", 2 * steps * BATCH * LENGTH)
    return train_on, testbed.corpus.tokens("held-out", 32 * (LENGTH + 1)).view(32, LENGTH + 1)


def at(x: float, curve: list[tuple[float, float]]) -> float:
    """Value of a curve at x, on straight lines between its points; its end beyond them.

    Examples:
        >>> at(1.5, [(0, 8.0), (1, 4.0), (3, 2.0)]), at(9, [(0, 8.0), (1, 4.0)])
        (3.5, 4.0)
    """
    for (left, low), (right, high) in pairwise(curve):
        if left <= x < right:
            return low + (high - low) * (x - left) / (right - left)
    return curve[-1][1]
