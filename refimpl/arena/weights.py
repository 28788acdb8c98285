r"""One layer's weight, compressed: how far does the layer's output move, and how many bytes are held?

The substrate is synthetic and drawn from the seed: a `[256, 512]` weight whose columns differ in size, and 1,024 inputs that
are correlated (rank-64 signal plus noise), with eight channels 20 times larger than the rest, as trained models have them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refimpl.arena.protocol import Metric

OUT, IN, ROWS = 256, 512, 1024

ABOUT = (
    "A synthetic layer of 256 outputs and 512 inputs with correlated inputs and eight outlier channels: relative error of "
    "the output, bytes held, and the time to compress."
)
METRICS = (
    Metric("output_error", "share of ‖XWᵀ‖", "lower"),
    Metric("weight_error", "share of ‖W‖", "lower"),
    Metric("bytes", "bytes", "lower"),
    Metric("compression", "times fewer bytes than 16 bit", "higher"),
    Metric("seconds", "seconds", "lower", exact=False),
)
BASELINE = "16 bit"


def substrate(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight `[256, 512]` and inputs `[1024, 512]`, float32."""
    column_size = torch.exp(0.5 * torch.randn(IN, generator=generator))
    weight = torch.randn(OUT, IN, generator=generator) * column_size / IN**0.5
    inputs = torch.randn(ROWS, 64, generator=generator) @ torch.randn(64, IN, generator=generator) / 8
    inputs += 0.3 * torch.randn(ROWS, IN, generator=generator)
    inputs[:, torch.randperm(IN, generator=generator)[:8]] *= 20
    return weight, inputs


def baseline(generator: torch.Generator, device: torch.device) -> dict[str, float]:
    """The weight in bfloat16."""
    weight, inputs = (tensor.to(device) for tensor in substrate(generator))
    half, seconds = _median_time(weight.bfloat16)
    return _figures(weight, inputs, half.float(), half.nbytes, seconds)


def measure(
    implementation: Any, settings: dict[str, Any], generator: torch.Generator, device: torch.device
) -> dict[str, float]:
    """The weight compressed by `implementation(**settings)`."""
    weight, inputs = (tensor.to(device) for tensor in substrate(generator))
    method = implementation(**settings)
    compressed, seconds = _median_time(lambda: method(weight, inputs))
    return _figures(weight, inputs, compressed.dense(), compressed.nbytes, seconds)


def _median_time(step: Callable[[], Any]) -> tuple[Any, float]:
    """What a step returns, and its median time over nine runs after the first."""
    value, times = step(), []
    for _ in range(9):
        start = time.perf_counter()
        value = step()
        times.append(time.perf_counter() - start)
    return value, statistics.median(times)


def _figures(weight: Tensor, inputs: Tensor, dense: Tensor, nbytes: int, seconds: float) -> dict[str, float]:
    output = inputs @ weight.T
    return {
        "output_error": float((inputs @ dense.T - output).norm() / output.norm()),
        "weight_error": float((dense - weight).norm() / weight.norm()),
        "bytes": nbytes,
        "compression": 2 * weight.numel() / nbytes,
        "seconds": seconds,
    }
