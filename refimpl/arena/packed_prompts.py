r"""A prompt packed into a few trained tokens: how much of what it says is left, and what it takes.

One family of prompts: of 26 tokens one, anywhere, says by how much the input is to be moved on, in a circle of four; the others say
nothing. A small decoder learns the family with the whole prompt before it, as it comes. From there a method trains it on to
answer from the packed prompt alone (`prepare`, `batch`, `loss`, `pack`); the baseline goes on as before for as many steps. Then inputs are answered
behind prompts that were not seen, from what is held of them.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.data.prompting.compression.packed_prefix import Example
from refimpl.model.cache import Cache, FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

MOVES, NOISE, LENGTH = 4, 4, 26
FIRST_STEPS, STEPS, QUICK_STEPS, BATCH, FIRST_RATE, RATE = 70, 500, 120, 32, 8e-3, 6e-3
ASKED = 200

ABOUT = (
    f"A small decoder learns prompts of {LENGTH} tokens that say what to do with an input, and answers from what is held of them: share "
    "of right answers, bytes, and times."
)
VERSION = 1
METRICS = (
    Metric("accuracy", "share of right answers, 0.25 by chance", "higher"),
    Metric("compression", "times fewer bytes than the whole prompt's", "higher"),
    Metric("prompt_bytes", "bytes of a prompt", "lower"),
    Metric("train_seconds", "seconds of training from the model that reads whole prompts", "lower", exact=False),
    Metric("answer_seconds", "seconds of an answer, prompt already read", "lower", exact=False),
)
BASELINE = "whole prompt"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def baseline(conditions: Conditions) -> dict[str, float]:
    """All of the prompt is held."""
    model, start = _first(conditions), clock(conditions.device)
    _learn(model, whole_loss, map(_stacked, _drawn_batches(_steps(conditions), conditions)), conditions)
    seconds, examples = clock(conditions.device) - start, drawn(ASKED, conditions.generator)
    cache = FullCache()
    with torch.no_grad():
        model.hidden(torch.tensor([example.prompt for example in examples], device=conditions.device), cache)
    return _figures(model, examples, cache, cache.nbytes, seconds, conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    method, first = implementation(**settings), _first(conditions)
    start = clock(conditions.device)
    model = method.prepare(first)
    batches = map(partial(method.batch, model), _drawn_batches(_steps(conditions), conditions))
    _learn(model, method.loss, batches, conditions)
    seconds, examples = clock(conditions.device) - start, drawn(ASKED, conditions.generator)
    packed = method.pack(model, [example.prompt for example in examples])
    return _figures(model, examples, packed.cache(), packed.nbytes, seconds, conditions)


def _figures(
    model: Decoder, examples: list[Example], cache: Cache, nbytes: int, seconds: float, conditions: Conditions
) -> dict[str, float]:
    inputs = torch.tensor([example.input for example in examples], device=conditions.device)
    start = clock(conditions.device)
    said = generate(model, inputs, 1, cache=cache).cpu()
    answered = clock(conditions.device) - start
    shape = model.config
    whole = LENGTH * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * model.embedding.weight.element_size()
    return {
        "accuracy": float((said == torch.tensor([example.answer for example in examples])).float().mean()),
        "compression": whole * len(examples) / max(nbytes, 1),  # a control that hides all holds nothing
        "prompt_bytes": nbytes / len(examples),
        "train_seconds": seconds,
        "answer_seconds": answered / len(examples),
    }


def drawn(n: int, generator: torch.Generator) -> list[Example]:
    """So many prompts of the family, each with an input and its answer."""
    given, move = (torch.randint(MOVES, (n, 1), generator=generator) for _ in range(2))
    prompts = torch.randint(2 * MOVES, 2 * MOVES + NOISE, (n, LENGTH), generator=generator)
    prompts.scatter_(1, torch.randint(LENGTH, (n, 1), generator=generator), MOVES + move)
    rows = zip(prompts.tolist(), given.tolist(), ((given + move) % MOVES).tolist(), strict=True)
    return [Example(*row) for row in rows]


def whole_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the answers in `[batch, time]` of prompts, inputs and answers, which are the last tokens."""
    batch = batch.to(model.embedding.weight.device)
    return F.cross_entropy(model(batch[:, :-1])[:, -1].float(), batch[:, -1])


def _first(conditions: Conditions) -> Decoder:
    """The decoder that has learnt to read whole prompts."""
    takes_no_model(conditions)
    config = Config(vocabulary=2 * MOVES + NOISE, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64)
    model = initialize_(Decoder(config), conditions.generator, std=0.3).to(conditions.device)
    _learn(
        model, whole_loss, map(_stacked, _drawn_batches(FIRST_STEPS, conditions)), conditions, FIRST_STEPS, FIRST_RATE
    )
    return model


def _steps(conditions: Conditions) -> int:
    return QUICK_STEPS if conditions.quick else STEPS


def _drawn_batches(steps: int, conditions: Conditions) -> Iterable[list[Example]]:
    return (drawn(BATCH, conditions.generator) for _ in range(steps))


def _stacked(examples: list[Example]) -> Tensor:
    return torch.tensor([[*example.prompt, *example.input, *example.answer] for example in examples])


def _learn(
    model: Decoder,
    loss: Callable[[Any, Tensor], Tensor],
    batches: Iterable[Tensor],
    conditions: Conditions,
    steps: int | None = None,
    rate: float = RATE,
) -> None:
    """Train in place; the rate rises over a tenth of the steps and falls to a tenth of it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    train(
        model,
        optimizer,
        iter(batches),
        steps or _steps(conditions),
        loss=loss,
        schedule=lambda done: min(1.0, 0.1 + 10 * done) * (1 - 0.9 * done),
    )
    model.eval()
