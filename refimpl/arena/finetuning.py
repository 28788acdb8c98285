r"""A small model that knows task A is adapted to task B: how well, with how many parameters, at what cost?

The substrate is synthetic and drawn from the seed. A task is a pair of tables of scores, and the label of a position is the
best-scored token given this token and the one before, $\arg\max_j E_{x_t j} + F_{x_{t-1} j}$; task B's tables are task A's,
turned a quarter of the way towards random ones. A two-layer decoder of width 64, its layers named as Llama's, is trained on
A until it is right everywhere, then adapted to B in 120 steps. Each method gets the better of two learning rates, chosen on
held-out data.
"""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.finetuning.protocol import FineTuning, M

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 16, 8, 64, 4, 2
BATCH, PRETRAINING_STEPS, STEPS, QUICK_STEPS = 32, 200, 120, 30
LEARNING_RATES = (1e-2, 3e-2)

ABOUT = (
    "A two-layer decoder of width 64, trained on one synthetic token task and adapted to a shifted one in 120 steps: "
    "accuracy on the new task, parameters trained, bytes of AdamW's state, time of a step, and time of the merged model."
)
VERSION = 1
METRICS = (
    Metric("accuracy", "share of positions right", "higher"),
    Metric("trained_parameters", "parameters", "lower"),
    Metric("optimizer_bytes", "bytes", "lower"),
    Metric("seconds_per_step", "seconds", "lower", exact=False),
    Metric("latency_after_merge", "times the original model's", "lower", exact=False),
)
BASELINE = "full fine-tuning"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


class FullFineTuning:
    """Train everything: what the methods are held against."""

    def inject(self, model: M, generator: torch.Generator | None = None) -> M:  # noqa: ARG002  # nothing is drawn
        """Let every parameter train."""
        return model.requires_grad_(True)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters, by name."""
        return dict(model.named_parameters())

    def merge(self, model: M) -> M:
        """The model as it is."""
        return model


@dataclass(frozen=True)
class Data:
    """Labelled tokens of one task: inputs `[n, time]`, labels `[n, time - 1]` for all positions but the first."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Substrate:
    """A model that knows task A, and the data of task B; `seed` draws what a method draws."""

    model: nn.Module
    train: Data
    held_out: Data
    test: Data
    seed: int


@dataclass(frozen=True)
class Spent:
    """Cost of a training: bytes of the optimizer's state, median seconds of a step; and the loss of each step."""

    optimizer_bytes: int
    seconds_per_step: float
    losses: list[float]


def substrate(generator: torch.Generator, device: torch.device, steps: int | None = None) -> Substrate:
    """Draw the tasks and the data, and train the model on task A; `steps` is how long a method adapts it, 120 if None."""
    steps = steps or STEPS
    tables = torch.randn(2, 2, VOCABULARY, VOCABULARY, generator=generator)
    angle = math.pi / 2 / 4
    shifted = math.cos(angle) * tables[0] + math.sin(angle) * tables[1]
    draws = [(tables[0], PRETRAINING_STEPS * BATCH), (shifted, steps * BATCH), (shifted, 256), (shifted, 512)]
    before, train, held_out, test = (_draw(table, n, generator, device) for table, n in draws)
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder().to(device)
    _train(model, dict(model.named_parameters()), before, learning_rate=4e-3)
    return Substrate(model, train, held_out, test, seed)


def baseline(conditions: Conditions) -> dict[str, float]:
    """Full fine-tuning."""
    return _under(conditions, FullFineTuning())


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return _under(conditions, implementation(**settings))


def _under(conditions: Conditions, method: FineTuning) -> dict[str, float]:
    takes_no_model(conditions)
    given = substrate(conditions.generator, conditions.device, QUICK_STEPS if conditions.quick else None)
    return figures(given, method, conditions.curves)


def figures(
    given: Substrate, method: FineTuning, curves: dict[str, Sequence[tuple[float, ...]]] | None = None
) -> dict[str, float]:
    """Adapt copies of the substrate's model at each learning rate, merge the best, and measure it; `curves` gets its loss."""
    runs = []
    for learning_rate in LEARNING_RATES:
        with torch.random.fork_rng():
            torch.manual_seed(given.seed)  # for dropout
            model = method.inject(copy.deepcopy(given.model), torch.Generator().manual_seed(given.seed))
            parameters = method.trainable(model)
            spent = _train(model, parameters, given.train, learning_rate)
        runs.append((_accuracy(model, given.held_out), -learning_rate, model, spent))
    _, _, model, spent = max(runs, key=lambda run: run[:2])
    if curves is not None:
        curves["loss over steps"] = [(step, loss) for step, loss in enumerate(spent.losses, 1) if step % 5 == 0]
    trained = sum(parameter.numel() for parameter in method.trainable(model).values())
    merged = method.merge(model)
    return {
        "accuracy": _accuracy(merged, given.test),
        "trained_parameters": trained,
        "optimizer_bytes": spent.optimizer_bytes,
        "seconds_per_step": spent.seconds_per_step,
        "latency_after_merge": _latency_ratio(merged, given.model, given.test.inputs[:BATCH]),
    }


class Decoder(nn.Module):
    """A decoder whose layers have the names of Llama's: `[batch, time]` tokens to `[batch, time, vocabulary]` scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every position."""
        hidden = self.embed_tokens(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        scores: Tensor = self.lm_head(self.norm(hidden))
        return scores


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.input_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, time, width]` to the same."""
        x = self.input_norm(hidden)
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.o_proj(mixed)
        change: Tensor = self.down_proj(F.gelu(self.up_proj(self.mlp_norm(hidden))))
        return hidden + change


def _draw(tables: Tensor, n: int, generator: torch.Generator, device: torch.device) -> Data:
    """Random tokens and their labels under a task's two tables, `[2, vocabulary, vocabulary]`."""
    inputs = torch.randint(0, VOCABULARY, (n, LENGTH), generator=generator)
    labels = (tables[0][inputs[:, 1:]] + tables[1][inputs[:, :-1]]).argmax(dim=-1)
    return Data(inputs.to(device), labels.to(device))


def _train(model: nn.Module, parameters: dict[str, nn.Parameter], data: Data, learning_rate: float) -> Spent:
    """One pass in batches with AdamW, the rate rising for a tenth of the steps and falling to zero."""
    steps = len(data.inputs) // BATCH
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    seconds, losses = [], []
    for step in range(steps):
        start = clock(data.inputs.device)
        batch = slice(step * BATCH, (step + 1) * BATCH)
        loss = F.cross_entropy(model(data.inputs[batch])[:, 1:].flatten(0, 1), data.labels[batch].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        seconds.append(clock(data.inputs.device) - start)
        losses.append(loss.detach())
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Spent(sum(value.nbytes for value in held), statistics.median(seconds), torch.stack(losses).tolist())


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    """Share of positions whose best-scored token is the label."""
    return float((model.eval()(data.inputs)[:, 1:].argmax(dim=-1) == data.labels).float().mean())


@torch.no_grad()
def _latency_ratio(model: nn.Module, original: nn.Module, inputs: Tensor) -> float:
    """Time of one forward over the original's: median of 21 pairs, run in turn."""
    ratios = []
    for _ in range(21):
        seconds = []
        for candidate in (model, original):
            start = clock(inputs.device)
            candidate(inputs)
            seconds.append(clock(inputs.device) - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
