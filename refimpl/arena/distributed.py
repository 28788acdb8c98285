r"""One small decoder trained by several processes: the same as by one? With how many bytes held and sent?

The substrate is synthetic and drawn from the seed: a two-layer decoder of width 64 in float32 and random tokens. Every run makes
the same four AdamW steps on the same batches; what one process makes of them is the reference. Processes are real, on this
machine: gloo on the CPU, nccl with one GPU for each. Bytes are rank 0's; those sent are counted as `refimpl.distributed` says.
"""

import copy
import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.distributed import Group
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.pretraining.system_level.data_parallel import DataParallel
from refimpl.pretraining.system_level.protocol import Parallel
from refimpl.processes import launch

SHAPE = Config(
    vocabulary=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=172, tied_embeddings=True
)
STEPS, ROWS, LENGTH = 4, 8, 32
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3)

ABOUT = (
    "A two-layer decoder of width 64 in float32, four AdamW steps of 8 rows by several processes: difference from one process, "
    "bytes that a rank holds and sends, and time of a step."
)
VERSION = 1
METRICS = (
    Metric(
        "difference",
        "largest difference of a parameter from one process, of the largest change that training made",
        "lower",
    ),
    Metric("parameter_bytes", "bytes held by rank 0", "lower"),
    Metric("gradient_bytes", "bytes held by rank 0 at the end of the backward pass", "lower"),
    Metric("state_bytes", "bytes held by rank 0 for the optimizer", "lower"),
    Metric("passing_bytes", "most bytes held by rank 0 for a moment beyond these", "lower"),
    Metric("sent_bytes", "bytes sent by rank 0 in a step", "lower"),
    Metric("seconds_per_step", "seconds", "lower", exact=False),
)
BASELINE = "data parallelism"
AXES: dict[str, tuple[Any, ...]] = {"processes": (2, 4)}
QUICK: dict[str, tuple[Any, ...]] = {"processes": (2,)}


def baseline(conditions: Conditions) -> dict[str, float]:
    """Everything on every rank."""
    return figures(DataParallel(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return figures(implementation(**settings), conditions)


def figures(method: Parallel, conditions: Conditions) -> dict[str, float]:
    """Train by one process and by several."""
    takes_no_model(conditions)
    model = initialize_(Decoder(SHAPE), conditions.generator)
    tokens = torch.randint(SHAPE.vocabulary, (STEPS, ROWS, LENGTH + 1), generator=conditions.generator)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = alone(copy.deepcopy(model), tokens)
    first, *_ = launch(program, conditions.axes["processes"], method, model, tokens, device=conditions.device.type)
    whole = first.pop("whole")
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    return {"difference": max(float((after[name] - whole[name]).abs().max()) for name in after) / moved, **first}


def alone(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The parameters after one process's training."""
    optimizer = OPTIMIZER(model.parameters())
    for batch in tokens:
        optimizer.zero_grad()
        loss(model(batch[:, :-1]), batch[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def program(group: Group, method: Parallel, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """What each rank does."""
    run = method(model.to(group.device), OPTIMIZER, loss, group)
    seconds, sent = [], []
    for batch in tokens.to(group.device):
        start, before = clock(group.device), group.sent.total()
        run.step(batch[:, :-1], batch[:, 1:])
        seconds.append(clock(group.device) - start)
        sent.append(group.sent.total() - before)
    return {
        "whole": {name: value.cpu() for name, value in run.whole().items()},
        "parameter_bytes": run.held.parameters,
        "gradient_bytes": run.held.gradients,
        "state_bytes": run.held.states,
        "passing_bytes": run.peak,
        "sent_bytes": sent[-1],
        "seconds_per_step": statistics.median(seconds),
    }


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
