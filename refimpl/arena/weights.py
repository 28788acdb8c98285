r"""One layer's weight, compressed: how far does the layer's output move, and how many bytes are held?

The substrate is synthetic and drawn from the seed: a `[256, 512]` weight whose columns differ in size, and 1,024 inputs that
are correlated (rank-64 signal plus noise), with eight channels 20 times larger than the rest, as trained models have them.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model

OUT, IN, ROWS = 256, 512, 1024

ABOUT = (
    "A synthetic layer of 256 outputs and 512 inputs with correlated inputs and eight outlier channels: relative error of "
    "the output, bytes held, and the time to compress."
)
VERSION = 1
METRICS = (
    Metric("output_error", "share of ‖XWᵀ‖", "lower"),
    Metric("weight_error", "share of ‖W‖", "lower"),
    Metric("bytes", "bytes", "lower"),
    Metric("compression", "times fewer bytes than 16 bit", "higher"),
    Metric("seconds", "seconds", "lower", exact=False),
)
BASELINE = "16 bit"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def substrate(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight `[256, 512]` and inputs `[1024, 512]`, float32."""
    column_size = torch.exp(0.5 * torch.randn(IN, generator=generator))
    weight = torch.randn(OUT, IN, generator=generator) * column_size / IN**0.5
    inputs = torch.randn(ROWS, 64, generator=generator) @ torch.randn(64, IN, generator=generator) / 8
    inputs += 0.3 * torch.randn(ROWS, IN, generator=generator)
    inputs[:, torch.randperm(IN, generator=generator)[:8]] *= 20
    return weight, inputs


def baseline(conditions: Conditions) -> dict[str, float]:
    """The weight in bfloat16."""
    weight, inputs = _on_device(conditions)
    half, seconds = _median_time(weight.bfloat16, conditions)
    return _figures(weight, inputs, half.float(), inputs, half.nbytes, seconds)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The weight compressed by `implementation(**settings)`; a method of whole models takes part by its `layer`, if it has one."""
    weight, inputs = _on_device(conditions)
    method = implementation(**settings)
    method = getattr(method, "layer", method)
    compressed, seconds = _median_time(lambda: method(weight, inputs), conditions)
    return _figures(weight, inputs, compressed.dense(), compressed.read(inputs), compressed.nbytes, seconds)


def _on_device(conditions: Conditions) -> tuple[Tensor, Tensor]:
    takes_no_model(conditions)
    weight, inputs = substrate(conditions.generator)
    return weight.to(conditions.device), inputs.to(conditions.device)


def _median_time(step: Callable[[], Any], conditions: Conditions) -> tuple[Any, float]:
    """What a step returns, and its median time over nine runs after the first; quick: over one."""
    value, times = step(), []
    for _ in range(1 if conditions.quick else 9):
        start = clock(conditions.device)
        value = step()
        times.append(clock(conditions.device) - start)
    return value, statistics.median(times)


def _figures(
    weight: Tensor, inputs: Tensor, dense: Tensor, read: Tensor, nbytes: int, seconds: float
) -> dict[str, float]:
    output = inputs @ weight.T
    return {
        "output_error": float((read @ dense.T - output).norm() / output.norm()),
        "weight_error": float((dense - weight).norm() / weight.norm()),
        "bytes": nbytes,
        "compression": 2 * weight.numel() / nbytes,
        "seconds": seconds,
    }
