r"""Attention methods beside exact attention: how far off, what they remember, and how cost grows with length.

The substrate is synthetic and drawn from the seed, four heads of dimension 32, causal. *Error*: 512 positions, each about
one of 16 topics; queries and keys are the topic's direction plus noise, so that exact attention looks mostly at the same
topic. *Recall*: 16 pairs of a random key and a random value, then every key as a query; right is an output that points most
nearly to the key's own value. Nothing is trained: a method meets queries and keys that were not made for it.
"""

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from refimpl.architecture.attention.protocol import Attention, Softmax
from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model

HEADS, DIM = 4, 32
PAIRS = 16

ABOUT = (
    "Four heads of dimension 32 on synthetic, untrained queries, keys and values, causal: distance to exact attention, "
    "recall of 16 stored pairs, growth of operations with length, bytes that a decoder holds, and time of a forward."
)
VERSION = 1
METRICS = (
    Metric("error", "share of exact attention's norm", "lower"),
    Metric("recall", "share of 16 pairs", "higher"),
    Metric("flops_exponent", "power of the length, 512 to 2,048", "lower"),
    Metric("state_bytes_4096", "bytes after 4,096 tokens in bfloat16", "lower"),
    Metric("seconds_2048", "seconds for 2,048 tokens", "lower", exact=False),
)
BASELINE = "softmax attention"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def baseline(conditions: Conditions) -> dict[str, float]:
    """Exact attention by PyTorch's kernels."""
    return _figures(Softmax(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return _figures(implementation(**settings), conditions)


@torch.no_grad()
def _figures(method: Attention, conditions: Conditions) -> dict[str, float]:
    takes_no_model(conditions)
    generator, device = conditions.generator, conditions.device
    q, k, v = (x.to(device) for x in _topics(512, generator))
    exact = Softmax()(q, k, v)
    long = _draw(4096, generator).to(device)
    medium, short, half = long[:, :, :2048], long[:, :, :512], long.bfloat16()
    return {
        "error": float((method(q, k, v) - exact).norm() / exact.norm()),
        "recall": _recall(method, generator, device),
        "flops_exponent": math.log(flops(method, medium) / flops(method, short), 4),
        "state_bytes_4096": method.state_bytes(half, half),
        "seconds_2048": _seconds(method, medium, 1 if conditions.quick else 5),
    }


def flops(method: Attention, x: Tensor) -> int:
    """Operations of matrix products in one causal forward; exact attention counts its whole square."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method(x, x, x)
    return int(counter.get_total_flops())


def _draw(length: int, generator: torch.Generator) -> Tensor:
    """`[1, heads, length, dim]`, standard normal."""
    return torch.randn(1, HEADS, length, DIM, generator=generator)


def _topics(length: int, generator: torch.Generator) -> list[Tensor]:
    """Queries, keys and values of positions that are about one of 16 topics each."""
    directions = 4 * F.normalize(torch.randn(HEADS, 16, DIM, generator=generator), dim=-1)
    topic = directions[None, :, torch.randint(0, 16, (length,), generator=generator)]
    query, key = (topic + _draw(length, generator) / 2 for _ in range(2))
    return [query, key, _draw(length, generator)]


def _recall(method: Attention, generator: torch.Generator, device: torch.device) -> float:
    """Share of pairs whose value points most nearly to what its key brings back."""
    keys, values = math.sqrt(DIM) * F.normalize(_draw(PAIRS, generator), dim=-1), _draw(PAIRS, generator)
    asked, nothing = torch.randperm(PAIRS, generator=generator), torch.zeros_like(keys)
    halves = ((nothing, 2 * keys[:, :, asked]), (keys, nothing), (values, nothing))  # pairs first, then questions
    out = method(*(torch.cat(half, dim=2).to(device) for half in halves))[0, :, PAIRS:].cpu()
    answers = (F.normalize(out, dim=-1) @ F.normalize(values[0], dim=-1).mT).argmax(dim=-1)
    return float((answers == asked).float().mean())


def _seconds(method: Attention, x: Tensor, repeats: int) -> float:
    """Median of a few forwards, after one to warm up."""
    seconds = []
    for _ in range(1 + repeats):
        start = clock(x.device)
        method(x, x, x)
        seconds.append(clock(x.device) - start)
    return statistics.median(seconds[1:])
