r"""What a compressed cache costs and saves in a step of decoding, in one layer of the size of Llama-3-8B's.

Keys and values of a prompt are drawn at random, in bfloat16, 32 query heads over 8 key heads of 128. Then tokens are decoded one by
one: the cache takes in a key and gives back what it holds, and the query attends to it. The same steps with an uncompressed
cache take turns with these, in the same process.

A step reads the cache. Where reading is all that takes time, it takes bytes over bandwidth: `floor_seconds`, by the bandwidth
measured in the same process. Unpacking takes time, too, and here it is several operations of PyTorch, each of which writes to memory what
a fused kernel would keep in registers. `price` says what it comes to: the time that a step takes longer than with the uncompressed
cache, for each GB that it holds, and so reads, less. It pays where a GB takes longer than that to read or to be moved: `read_seconds`
is what it takes in this machine's memory; over a link to another memory or from a disk it takes more. Below 0 it pays anywhere.
A cache that holds no less, and reads a part of it at each step, is faster or slower by `slowdown` alone: its price is 0, and the floor
above what it reads.
"""

import statistics
from typing import Any

import torch
from torch import Tensor

from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.model.cache import Cache, FullCache
from refimpl.model.config import Config
from refimpl.model.model import Attention
from refimpl.model.step import Step

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
STEPS, QUICK_STEPS, CHUNK = 15, 3, 2048
BANDWIDTH_BYTES = 2**28

ABOUT = (
    "One layer of the size of Llama-3-8B's in bfloat16, random keys: bytes of the cache, time of a decoded token beside the "
    "uncompressed cache's, and what a byte less costs against what it costs to read one."
)
VERSION = 1
METRICS = (
    Metric("bytes", "bytes held", "lower"),
    Metric("compression", "times fewer bytes than all tokens'", "higher"),
    Metric("compress_seconds", "seconds to take in the prompt", "lower", exact=False),
    Metric("seconds_per_token", "seconds", "lower", exact=False),
    Metric("slowdown", "times as long as with the uncompressed cache", "lower", exact=False),
    Metric("floor_seconds", "seconds to read what is held once", "lower", exact=False),
    Metric(
        "price", "seconds a token takes longer for each GB held less; 0 where no less is held", "lower", exact=False
    ),
    Metric("read_seconds", "seconds to read a GB of this machine's memory", "neither", exact=False),
)
BASELINE = "full cache"
AXES: dict[str, tuple[Any, ...]] = {"tokens": (8192, 32768)}
QUICK: dict[str, tuple[Any, ...]] = {"tokens": (8192,)}


def config_of(tokens: int) -> Config:
    """A decoder whose layers have this size; nothing else of it is used."""
    return Config(
        vocabulary=1,
        d_model=HEADS * HEAD_DIM,
        n_layers=1,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        d_ff=1,
        max_positions=2 * tokens,
    )


def baseline(conditions: Conditions) -> dict[str, float]:
    """All keys and values; beside itself."""
    return _figures(_full(conditions), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The cache of `implementation(**settings)`; `compression` stands for the budget that is so many times smaller.

    Raises:
        TypeError: the method makes no cache.
    """
    if not callable(getattr(implementation, "cache", None)):
        raise TypeError(f"{implementation.__name__} has no `cache(config)`, through which methods join this arena")
    own, tokens = dict(settings), conditions.axes["tokens"]
    if "compression" in own:
        own["budget"] = tokens_to_keep(tokens, own.pop("compression"))
    return _figures(implementation(**own).cache(config_of(tokens)), conditions)


def _full(conditions: Conditions) -> Cache:
    return FullCache(reserve=conditions.axes["tokens"] + STEPS + 1)


@torch.no_grad()
def _figures(cache: Cache, conditions: Conditions) -> dict[str, float]:
    takes_no_model(conditions)
    tokens, device = conditions.axes["tokens"], conditions.device
    layer, plain, taken = Layer(config_of(tokens), device), _full(conditions), 0.0
    for chunk in torch.split(_drawn(tokens, conditions), CHUNK, dim=3):
        layer.take(chunk, plain)
        start = clock(device)
        layer.take(chunk, cache)
        taken += clock(device) - start
    start = clock(device)
    cache.compress_prefill()
    taken += clock(device) - start
    seconds: dict[int, list[float]] = {id(cache): [], id(plain): []}
    for _ in range((QUICK_STEPS if conditions.quick else STEPS) + 1):
        token = _drawn(1, conditions)
        for memory in (plain, cache):
            start = clock(device)
            layer.attend(token, memory)
            seconds[id(memory)].append(clock(device) - start)
    mine, theirs = (statistics.median(seconds[id(memory)][1:]) for memory in (cache, plain))  # the first is slow
    whole = 2 * KV_HEADS * HEAD_DIM * 2 * plain.length
    read = read_seconds(device)
    return {
        "bytes": cache.nbytes,
        "compression": whole / cache.nbytes,
        "compress_seconds": taken,
        "seconds_per_token": mine,
        "slowdown": mine / theirs,
        "floor_seconds": cache.nbytes * read / 1e9,
        "price": (mine - theirs) / ((plain.nbytes - cache.nbytes) / 1e9) if cache.nbytes < plain.nbytes else 0.0,
        "read_seconds": read,
    }


class Layer:
    """Attention through a cache, without projections.

    Args:
        config: its shape.
        device: where it runs.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        with torch.device("meta"):
            self.attention = Attention(config, 0)
        self.device = device

    def take(self, drawn: Tensor, cache: Cache) -> None:
        """Hand tokens of a prompt over to the cache, whose answer is not attended to: as if a fused kernel read the prompt."""
        q, k, v = drawn[0], drawn[1, :, :KV_HEADS], drawn[2, :, :KV_HEADS]
        cache.update(0, k, v, q, torch.arange(cache.length, cache.length + k.shape[2], device=self.device)[None])

    def attend(self, drawn: Tensor, cache: Cache) -> Tensor:
        """What a token's query finds, `[1, heads, 1, head_dim]`."""
        at = cache.length
        step = Step(at, torch.tensor([[at]], device=self.device), drawn, drawn, cache, None, None)
        return self.attention.mix(drawn[0], drawn[1, :, :KV_HEADS], drawn[2, :, :KV_HEADS], step)


def _drawn(tokens: int, conditions: Conditions) -> Tensor:
    """Queries, keys and values `[3, 1, heads, tokens, head_dim]`; of the last two the first `KV_HEADS` heads are used."""
    drawn = torch.randn(3, 1, HEADS, tokens, HEAD_DIM, generator=conditions.generator)
    return drawn.to(conditions.device, torch.bfloat16)


def read_seconds(device: torch.device) -> float:
    """Seconds to read a GB: a large copy reads its bytes and writes as many; the median of nine."""
    source = torch.ones(BANDWIDTH_BYTES, dtype=torch.uint8, device=device)
    target, taken = torch.empty_like(source), []
    for _ in range(9):
        start = clock(device)
        target.copy_(source)
        taken.append(clock(device) - start)
    return statistics.median(taken) / (2 * BANDWIDTH_BYTES / 1e9)
