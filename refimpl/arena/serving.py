r"""The same requests served in other ways: how fast, how long do they wait, how much memory is held, and what is it used for?

A trace is drawn from the seed: prompts are windows of real text that the model has not seen, of 16 to 96 tokens; half of them begin with
one of two preambles of 64 tokens. Arrivals are a Poisson process in iterations, dense enough that requests queue. Every client asks for 64
new tokens at most, and most answers end earlier: a length is drawn for each, and the token that the model says there when it is alone is
the request's stop token. So a server can't know lengths beforehand, and all servers meet the same ones.

Time is counted in iterations of the model, which repeat from the seed; tokens per second depend on the machine, and on a CPU an
iteration over eight requests takes far longer than one over a single request. So does one that reads long prompts, and it counts as one
all the same: what is spared by finding a part of them in the memory shows in `hit_rate` and `prefill_tokens`; the time to the first
token is that of waiting, and an iteration.

What is offloaded lies in files or in other memory than the device's; on a CPU both are the machine's, and `device_bytes` counts what
would be on a device.
"""

from typing import Any

import torch
from torch import Tensor

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric
from refimpl.inference.system_level.protocol import Request, Served, Serving
from refimpl.inference.system_level.static_batching import StaticBatching
from refimpl.model.generate import generate, pad
from refimpl.model.model import Decoder

REQUESTS, QUICK_REQUESTS = 48, 10
SHORTEST, LONGEST, PREAMBLE, PREAMBLES = 16, 96, 64, 2  # tokens of a prompt's own part, of a preamble; how many of them
ASKED, BETWEEN, SLOTS = 64, 1.0, 8  # new tokens asked for; mean iterations between arrivals; requests in an iteration
UNSEEN_TOKENS = 40_000

ABOUT = (
    "The testbed's model serves a queue of requests of varying length, half of which share a beginning: tokens a second, "
    "iterations, waiting, time to the first token, use of the slots, bytes of the caches, what share of them holds tokens, and what share of "
    "the prompts was found in them."
)
VERSION = 4
METRICS = (
    Metric("tokens_per_second", "new tokens, over all requests", "higher", exact=False),
    Metric("iterations", "passes of the model", "lower"),
    Metric("waiting", "mean iterations from arrival to admission", "lower"),
    Metric("first_token_p50", "iterations from arrival to the first token, at most, of half of the requests", "lower"),
    Metric("first_token_p99", "the same of 99 % of the requests; of fewer than 100 requests the longest", "lower"),
    Metric("utilization", "share of the slots, over all iterations, that gave a token", "higher"),
    Metric("peak_bytes", "bytes of the caches at the peak", "lower"),
    Metric("device_bytes", "bytes on the device at the peak: weights, and memory for caches, taken or not", "lower"),
    Metric("peak_used", "share of the caches' bytes at their peak that holds tokens", "higher"),
    Metric("share_used", "share of the bytes held that holds tokens, over all iterations", "higher"),
    Metric("prefill_tokens", "tokens computed to read prompts, padding and repetition included", "lower"),
    Metric("hit_rate", "share of the prompts' tokens that were in a cache when the prompt was first read", "higher"),
    Metric("identical", "share of the answers equal to those of a request alone", "higher"),
)
BASELINE = "static batching"
AXES: dict[str, tuple[Any, ...]] = {"memory": (1024, 4096)}  # entries that all caches together may have
QUICK: dict[str, tuple[Any, ...]] = {"memory": (1024,)}


def baseline(conditions: Conditions) -> dict[str, float]:
    """Static batching."""
    return _figures(StaticBatching, {}, conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`, with the arena's slots and memory."""
    return _figures(implementation, settings, conditions)


def _figures(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    given = testbed.subject(conditions.model, conditions.device)
    requests, alone = trace(given.model, given.text("held-out", UNSEEN_TOKENS), conditions)
    method: Serving = implementation(slots=SLOTS, memory=conditions.axes.get("memory", 4096), **settings)
    method.serve(given.model, requests[:2])  # the first call of anything is slow
    served: Served = method.serve(given.model, requests)
    return {
        "tokens_per_second": sum(len(tokens) for tokens in served.tokens) / served.seconds,
        "iterations": served.iterations,
        "waiting": served.waiting,
        "first_token_p50": served.first_token(50),
        "first_token_p99": served.first_token(99),
        "utilization": served.utilization,
        "peak_bytes": served.peak_bytes,
        "device_bytes": served.device_bytes,
        "peak_used": served.peak_used / served.peak_bytes,
        "share_used": served.share_used,
        "prefill_tokens": served.prefill_tokens,
        "hit_rate": served.hit_rate,
        "identical": sum(x == y for x, y in zip(served.tokens, alone, strict=True)) / len(requests),
    }


def trace(model: Decoder, text: Tensor, conditions: Conditions) -> tuple[list[Request], list[list[int]]]:
    """Requests, and what each is answered alone.

    Args:
        model: whose answers decide where they end.
        text: `[time]`, where prompts are cut from.
        conditions: the source of everything random, and how many.
    """
    generator, count = conditions.generator, QUICK_REQUESTS if conditions.quick else REQUESTS

    def cut(length: int) -> list[int]:
        start = int(torch.randint(len(text) - length, (), generator=generator))
        return [int(token) for token in text[start : start + length]]

    preambles = [cut(PREAMBLE) for _ in range(PREAMBLES)]
    prompts = [
        (preambles[i // 2 % PREAMBLES] if i % 2 else []) + cut(length)
        for i, length in enumerate(torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist())
    ]
    gaps = torch.empty(count).exponential_(1 / BETWEEN, generator=generator)
    arrivals = gaps.cumsum(0).long().tolist()
    lengths = torch.randint(1, ASKED + 1, (count,), generator=generator).tolist()
    tokens, padding = (x.to(conditions.device) for x in pad(prompts))
    said = generate(model, tokens, ASKED, padding=padding).tolist()
    requests, alone = [], []
    for prompt, arrival, length, answer in zip(prompts, arrivals, lengths, said, strict=True):
        stop = answer[length - 1]
        requests.append(Request(prompt=tuple(prompt), n=ASKED, arrival=arrival, stop=frozenset({stop})))
        alone.append(answer[: answer.index(stop) + 1])
    return requests, alone
