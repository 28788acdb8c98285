r"""Sequence mixers trained on associative recall: what do they remember, in how many bytes, and how fast are they?

Multi-query associative recall (Zoology, arXiv 2312.04927, Section 3): a text states pairs of a key and a value, then asks for
every key in random order; right is the likeliest value at the key. Keys and values are drawn anew for each text from 16 of
each kind. A model has two layers of one mixer and width 32, and no feed-forward; a layer is what the method's `build` makes, and so
one of Griffin's holds the blocks of its pattern, and one of RWKV's has no channel mixing: `parameters` tells. As all models of that paper have a short
convolution, the input of a position here holds the token before it too. All train from the seed at one learning rate on
the same number of tokens, which is fewer texts where these are longer. A mixer may stay for long at what it would have if it
knew the values of a text but not their keys, a third of 4 pairs, and leave it late: the curve shows it.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig, States
from refimpl.architecture.alternatives.protocol import SequenceMixer, linear
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.model.train import train

WIDTH, LAYERS = 32, 2
KEYS = VALUES = 16
BATCH, STEPS, QUICK_STEPS, RATE = 32, 1500, 80, 5e-3  # steps with 4 pairs; fewer with more
TEXTS = 512  # held-out
LENGTH = 1024  # positions at which bytes and seconds are measured

ABOUT = (
    "Two layers of width 32 trained on associative recall of 4 or 16 pairs of a key and a value: share recalled, bytes "
    "that a decoder holds after 1,024 tokens, and seconds for a token, read in one forward or generated step by step. A "
    "layer of Griffin holds the blocks of its pattern, one of RWKV no channel mixing."
)
VERSION = 1
METRICS = (
    Metric("accuracy", "share of values right", "higher"),
    Metric("parameters", "parameters", "neither"),
    Metric("state_bytes", "bytes for one text of 1,024 tokens", "lower"),
    Metric("forward_seconds", "seconds a token, 1,024 at once", "lower", exact=False),
    Metric("step_seconds", "seconds a token, after 1,024", "lower", exact=False),
)
BASELINE = "softmax attention"
AXES: dict[str, tuple[Any, ...]] = {"pairs": (4, 16)}
QUICK: dict[str, tuple[Any, ...]] = {"pairs": (4,)}


class Recaller(nn.Module):
    """A language model whose inputs hold the token before, too."""

    def __init__(self, method: SequenceMixer, generator: torch.Generator) -> None:
        super().__init__()
        config = LanguageModelConfig(vocabulary=KEYS + VALUES, d_model=WIDTH, n_layers=LAYERS, tied_embeddings=False)
        self.before = linear(WIDTH, WIDTH, generator)
        self.model = LanguageModel(config, lambda _: method.build(WIDTH, generator)).initialize(generator, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, `[batch, time, vocabulary]`."""
        x = self.model.embedding(tokens)
        logits: Tensor = self.model(x + F.pad(self.before(x), (0, 0, 1, 0))[:, :-1])
        return logits


def baseline(conditions: Conditions) -> dict[str, float]:
    """Softmax attention, two heads."""
    return figures(SoftmaxAttention(head_dim=16), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return figures(implementation(**settings), conditions)


def figures(method: SequenceMixer, conditions: Conditions) -> dict[str, float]:
    """Train a model and measure it; adds the curve `accuracy over tokens`."""
    takes_no_model(conditions)
    pairs = int(conditions.axes["pairs"])
    seed, held_out = (int(torch.randint(2**31, (), generator=conditions.generator)) for _ in range(2))
    test = texts(TEXTS, pairs, torch.Generator().manual_seed(held_out)).to(conditions.device)
    model, conditions.curves["accuracy over tokens"] = trained(method, pairs, seed, conditions)
    return {
        "accuracy": accuracy(model, test, pairs),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **costs(model.model.eval(), conditions),
    }


def texts(n: int, pairs: int, generator: torch.Generator) -> Tensor:
    """Texts and answers, `[n, 3 * pairs + pairs]`: key, value, key, value, ..., the keys in another order; then their values."""
    keys = torch.rand(n, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (n, pairs), generator=generator)
    order = torch.rand(n, pairs, generator=generator).argsort(dim=1)
    stated = torch.stack((keys, values), dim=-1).flatten(1)
    return torch.cat((stated, keys.gather(1, order), values.gather(1, order)), dim=1)


def trained(
    method: SequenceMixer, pairs: int, seed: int, conditions: Conditions
) -> tuple[Recaller, list[tuple[float, float]]]:
    """A model, and its accuracy over the tokens that it was trained on, in tenths of the training."""
    generator = torch.Generator().manual_seed(seed)
    model = Recaller(method, generator).to(conditions.device)
    steps, hits = max(1, (QUICK_STEPS if conditions.quick else STEPS) * 4 // pairs), []

    def batches() -> Iterator[Tensor]:
        while True:
            yield texts(BATCH, pairs, generator).to(conditions.device)

    def loss(recaller: nn.Module, batch: Tensor) -> Tensor:
        logits = recaller(batch[:, : 3 * pairs])[:, 2 * pairs :]
        hits.append((logits.argmax(dim=-1) == batch[:, 3 * pairs :]).float().mean().item())
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 3 * pairs :].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    train(model, optimizer, batches(), steps, loss=loss, schedule=lambda done: min(1.0, 10 * done + 0.1) * (1 - done))
    tenth = max(1, steps // 10)
    ends = range(tenth, steps + 1, tenth)
    return model, [(end * BATCH * 3 * pairs, statistics.mean(hits[end - tenth : end])) for end in ends]


@torch.no_grad()
def accuracy(model: Recaller, test: Tensor, pairs: int) -> float:
    """Share of values that come out as the likeliest token."""
    logits = model.eval()(test[:, : 3 * pairs])[:, 2 * pairs :]
    return float((logits.argmax(dim=-1) == test[:, 3 * pairs :]).float().mean())


@torch.no_grad()
def costs(model: LanguageModel, conditions: Conditions) -> dict[str, float]:
    """Bytes of the states of one text, and seconds a token, read at once and one by one."""
    tokens = torch.randint(KEYS, (1, LENGTH), generator=conditions.generator).to(conditions.device)
    states = States()
    model(tokens, states)
    nbytes = states.nbytes
    forward = median_seconds(lambda: model(tokens), 5, conditions)
    step = median_seconds(lambda: model(tokens[:, :1], states), 25, conditions)
    return {"state_bytes": nbytes, "forward_seconds": forward / LENGTH, "step_seconds": step}


def median_seconds(run: Callable[[], Any], times: int, conditions: Conditions) -> float:
    """Median time of some runs, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = clock(conditions.device)
        run()
        seconds.append(clock(conditions.device) - start)
    return statistics.median(seconds[1:])
