r"""Position encodings beyond the length they were trained at: what becomes of the loss, and of a fact far back?

For each method a decoder of two layers and width 64 is trained from the seed on texts of 64 characters of the testbed's
corpus, then reads texts of 64, 128, 256 and 512. *Loss*: the same held-out text, cut into windows of each length, so that
only the context differs. *Recall*: in every training text four characters are replaced by facts, each one token that
states the value (of eight) of a key (of four), and the text ends with the four keys in random order, each with its value;
asked at each length with the facts anywhere before. In training the loss of the text and that of the values count alike. A
method that extends a trained rotary model gets one that was trained the same way, and then the tuning that it asks for, a
tenth as many steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.long_context.positions.protocol import Embedding, Positions
from refimpl.arena.protocol import Conditions, Metric, takes_no_model
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import geometric
from refimpl.model.train import train, windows
from refimpl.testbed import corpus

LENGTH, TIMES = 64, (1, 2, 4, 8)
KEYS, VALUES, ASCII = 4, 8, 128
BATCH, RATE, STD = 16, 3e-3, 0.1
STEPS, QUICK_STEPS = 1000, 200
TEXT, ROWS = 16384, 128  # characters of held-out text, texts of recall a length

ABOUT = (
    "A two-layer decoder of width 64, trained on texts of 64 characters, reads 64 to 512: loss on the same held-out text in "
    "windows of each length, and recall of four facts stated anywhere in it."
)
VERSION = 1
METRICS = (
    *(Metric(f"loss_{n}x", f"nats a character at {n} times the trained length", "lower") for n in TIMES),
    *(Metric(f"recall_{n}x", f"share of facts at {n} times the trained length", "higher") for n in TIMES),
)
BASELINE = "sinusoidal"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


@dataclass(frozen=True)
class Sinusoidal(Positions):
    """The first Transformer's vectors, added to the embeddings: what the methods are held against."""

    def embedding(self, config: Config, generator: torch.Generator | None = None) -> Embedding:  # noqa: ARG002
        """Sines in the even coordinates, cosines in the odd; nothing is drawn."""
        return partial(sinusoids, config.d_model)


def sinusoids(d_model: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """From positions `[batch or 1, time]` to `[batch or 1, time, d_model]`, d_model even."""
    angles = positions.unsqueeze(-1) * geometric(10000.0, d_model, torch.float32, positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


def baseline(conditions: Conditions) -> dict[str, float]:
    """Sinusoidal positions."""
    return figures(Sinusoidal(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return figures(implementation(**settings), conditions)


def figures(method: Positions, conditions: Conditions) -> dict[str, float]:
    """Train a decoder with the method, and measure it at each length; adds the curve `loss over length`."""
    takes_no_model(conditions)
    model = trained(method, conditions)
    text = characters("held-out", TEXT // 4 if conditions.quick else TEXT).to(conditions.device)
    questions = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=conditions.generator)))
    losses, recalls = {}, {}
    for n in TIMES:
        losses[n] = loss(model, text, n * LENGTH)
        recalls[n] = recall(model, text, n * LENGTH, ROWS // 4 if conditions.quick else ROWS, questions)
    conditions.curves["loss over length"] = [(n * LENGTH, value) for n, value in losses.items()]
    return {f"loss_{n}x": x for n, x in losses.items()} | {f"recall_{n}x": x for n, x in recalls.items()}


def trained(method: Positions, conditions: Conditions, length: int = LENGTH) -> Decoder:
    """A decoder that was trained with the method on texts of `length`, or trained as it is, then extended by it."""
    text = characters("train", 1_000_000)
    config = Config(
        vocabulary=ASCII + KEYS * VALUES + KEYS + VALUES,
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        d_ff=128,
        max_positions=length,
    )
    steps, generator = QUICK_STEPS if conditions.quick else STEPS, conditions.generator
    model = initialize_(Decoder(config), generator, STD)
    nn.init.normal_(model.embedding.weight, generator=generator)  # as large as the baseline's vectors
    model = model.to(conditions.device)
    # What a method draws must not move what the others meet.
    own = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
    if not method.extends:
        method.install(model, own)
    _fit(model, text, length, steps, generator)
    if method.extends:
        method.install(model, own)
        tuning = method.tuning_length(length)
        if tuning is not None:
            _fit(model, text, tuning, steps // 10, generator)
    return model.eval()


def characters(split: Literal["train", "held-out"], n: int) -> Tensor:
    """The testbed's text as its first n characters, `[n]`; what is not ASCII is a question mark.

    A model this small learns in seconds which character follows which, and hardly anything of words.
    """
    return torch.frombuffer(bytearray(_ascii(split)[:n]), dtype=torch.uint8).long()


@cache
def _ascii(split: Literal["train", "held-out"]) -> bytes:
    return "".join(corpus.documents(split).values()).encode("ascii", "replace")


def facts(rows: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Texts with a fact about each key at random places, and at the end each key, in random order, with its value.

    Args:
        rows: `[n, time]`, tokens of text; left unchanged.
        vocabulary: of the model; its last tokens stand for facts, keys and values.
        generator: source of places, values and order.

    Returns:
        `[n, time]`, of which the last 2 * `KEYS` are questions and answers in turn.
    """
    n, body = len(rows), rows.shape[1] - 2 * KEYS
    value = torch.randint(VALUES, (n, KEYS), generator=generator)
    place = torch.rand(n, body, generator=generator).argsort(dim=1)[:, :KEYS]
    order = torch.rand(n, KEYS, generator=generator).argsort(dim=1)
    first_fact = vocabulary - KEYS * VALUES - KEYS - VALUES
    fact = first_fact + torch.arange(KEYS) * VALUES + value
    asked = first_fact + KEYS * VALUES + order
    answer = first_fact + KEYS * VALUES + KEYS + value.gather(1, order)
    rows = rows.cpu().scatter(1, place, fact)
    return torch.cat((rows[:, :body], torch.stack((asked, answer), dim=-1).flatten(1)), dim=1)


@torch.no_grad()
def loss(model: Decoder, text: Tensor, length: int) -> float:
    """Mean cross-entropy, in nats, of a text in windows of `length`, each but the first token of the text predicted once."""
    n = (len(text) - 1) // length
    rows = text[: n * length].view(n, length)
    targets = text[1 : n * length + 1].view(n, length)
    each = max(1, 2048 // length)
    total = 0.0
    for x, y in zip(torch.split(rows, each), torch.split(targets, each), strict=True):
        total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    return total / (n * length)


@torch.no_grad()
def recall(model: Decoder, text: Tensor, length: int, n: int, generator: torch.Generator) -> float:
    """Share of `KEYS` * n facts that are told right, in texts of `length`; a guess is right once in `VALUES`."""
    rows = next(windows(text.cpu(), n, length - 1, generator))
    rows = facts(rows, model.config.vocabulary, generator).to(text.device)
    hidden = torch.cat([model.hidden(x)[:, -2 * KEYS :: 2] for x in torch.split(rows, max(1, 2048 // length))])
    told = model.logits(hidden)[..., -VALUES:].argmax(dim=-1) + model.config.vocabulary - VALUES
    return float((told == rows[:, -2 * KEYS + 1 :: 2]).float().mean())


def _fit(model: Decoder, text: Tensor, length: int, steps: int, generator: torch.Generator) -> None:
    """Train in place on texts of `length`, the rate rising for a tenth of the steps and falling to zero.

    Every step reads as many characters, whatever the length.
    """
    device, batch = model.embedding.weight.device, max(1, BATCH * LENGTH // length)

    def batches() -> Iterator[Tensor]:
        for rows in windows(text, batch, length, generator):
            yield facts(rows, model.config.vocabulary, generator).to(device)

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch[:, :-1])
        text = F.cross_entropy(logits[:, : -2 * KEYS].flatten(0, 1), batch[:, 1 : -2 * KEYS].flatten())
        values = F.cross_entropy(logits[:, -2 * KEYS + 1 :: 2].flatten(0, 1), batch[:, -2 * KEYS + 1 :: 2].flatten())
        return text + values

    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    train(
        model,
        optimizer,
        batches(),
        steps,
        loss=objective,
        schedule=lambda progress: min(10 * progress + 1 / steps, (1 - progress) / 0.9),
    )
