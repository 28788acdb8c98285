r"""Few bits for the weights of a trained model: what does training through the rounding win over rounding, and what does it cost?

The substrate is the testbed's model, or a checkpoint of the user's, in float32. A method that trains gets 60 steps of 4 x 128 tokens
of the testbed's training text (2 of 2 x 32 in the quick form), or of what its own sampling gives, with AdamW and a learning rate that
rises over the first tenth of the steps and falls to zero; a method that rounds gets the model as it is, and as much text for
calibration. Both are measured by what is packed in the end, on text that the model has not seen. The baseline is the model trained as
long in full precision: what more training alone brings.

The learning rate was chosen with seed 3, which is none of those that are reported. It is the largest of 1e-3, 3e-4, 2e-4, 1e-4 and 3e-5
at which the baseline does not get worse on unseen text; with 2 bits and fewer, where weights have far to go to the next level, it
is 1e-3, at which plain training through the rounding ends as well as at 2e-3, and better than at 3e-4.
"""

import copy
import math
import statistics
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.compression.protocol import CompressedLinear, apply, matching
from refimpl.memory import peak_of
from refimpl.model.linear import is_linear
from refimpl.model.model import Decoder
from refimpl.model.train import Loss, next_token_loss, perplexity, train, windows

STEPS, BATCH, LENGTH = 60, 4, 128
RATE, RATE_OF_FEW_BITS, FEW_BITS = 2e-4, 1e-3, 2
QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH = 2, 2, 32
TEXT, QUICK_TEXT = 100_000, 20_000  # tokens that batches are cut from
UNSEEN, QUICK_UNSEEN = 8_192, 256  # tokens that the figures are measured on
TASKS = ("single_doc_qa", "few_shot", "retrieval")
EXAMPLES, QUICK_EXAMPLES, PROMPT = 24, 1, 256  # of each task, and tokens of one

ABOUT = (
    "The testbed's model at few bits, trained through its quantization on 31,000 tokens, or rounded as it is with as many for "
    "calibration: perplexity of what is packed on unseen text, the loss added to that of the untouched model, mean score on three "
    "tasks, bits really held, and the time and memory that it takes. The learning rate was chosen with a seed that is not reported: "
    "the largest tried at which training in full precision does no harm on unseen text, and with 2 bits and fewer the best tried, which is larger."
)
VERSION = 2
METRICS = (
    Metric("perplexity", "on unseen text, packed", "lower"),
    Metric(
        "added",
        "nats a token of unseen text beyond the loss of the model as it was, neither rounded nor trained",
        "lower",
    ),
    Metric("before", "perplexity before any training, packed", "lower"),
    Metric("score", "mean of three tasks, 0 to 1", "higher"),
    Metric("bits", "per weight of the linear layers, scales included", "lower"),
    Metric("layer_bytes", "bytes of linear layers, without the output layer", "lower"),
    Metric("seconds", "seconds of training, or of rounding", "lower", exact=False),
    Metric("seconds_per_step", "seconds of a step of training", "lower", exact=False),
    Metric(
        "peak_bytes", "bytes that training or rounding takes at its peak, beside the model itself", "lower", exact=False
    ),
)
BASELINE = "full precision, trained as long"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def baseline(conditions: Conditions) -> dict[str, float]:
    """The model trained in float32; its layers are counted in 16 bits."""
    given = Given(conditions)
    with peak_of(conditions.device) as peak:
        model = copy.deepcopy(given.model)
        seconds = given.train(model, given.text(), next_token_loss, RATE)
    size = sum(2 * layer.weight.numel() for layer in matching(model).values())
    return given.figures(model.eval(), given.model, size) | _cost(seconds, given.steps, peak.bytes)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The model trained by `implementation(**settings)` where that has `prepare`, otherwise compressed by it."""
    method = implementation(**settings)
    given = Given(conditions)
    if not hasattr(method, "prepare"):
        calibration = [batch[:, :-1] for batch in islice(given.text(), given.steps)]
        start = clock(conditions.device)
        with peak_of(conditions.device) as peak:
            small = apply(method, given.model, calibration)
        seconds = clock(conditions.device) - start
        return given.figures(small, small, layer_bytes(small)) | _cost(seconds, 0, peak.bytes)
    with peak_of(conditions.device) as peak:
        student = method.prepare(given.model)
        with torch.no_grad():
            student(next(given.text())[:, :-1])  # places the grids of activations
        before = method.convert(student)
        drawn = torch.Generator().manual_seed(given.seed)
        batches = method.batches(given.model, given.tokens, given.batch, given.length, drawn)
        rate = RATE if getattr(method, "bits", FEW_BITS) > FEW_BITS else RATE_OF_FEW_BITS  # three values are few, too
        seconds = given.train(student, batches, lambda model, batch: method.loss(model, given.model, batch), rate)
        small = method.convert(student)
    return given.figures(small, before, layer_bytes(small)) | _cost(seconds, given.steps, peak.bytes)


def _cost(seconds: float, steps: int, peak_bytes: int) -> dict[str, float]:
    return {
        "seconds": seconds,
        "seconds_per_step": seconds / steps if steps else 0.0,
        "peak_bytes": peak_bytes,
    }


class Given:
    """The substrate: a model, texts, and the order in which they are shown, drawn from the seed.

    Args:
        conditions: of the cell.
    """

    def __init__(self, conditions: Conditions) -> None:
        quick, self.device, self.curves = conditions.quick, conditions.device, conditions.curves
        self.subject = testbed.subject(conditions.model, self.device)
        self.model = self.subject.model.eval()
        self.steps, self.batch, self.length = (
            (QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH) if quick else (STEPS, BATCH, LENGTH)
        )
        self.tokens = self.subject.text("train", QUICK_TEXT if quick else TEXT).to(self.device)
        self.unseen = self.subject.text("held-out", QUICK_UNSEEN if quick else UNSEEN).to(self.device)
        self.seed = int(torch.randint(2**31, (), generator=conditions.generator))
        n = QUICK_EXAMPLES if quick else EXAMPLES
        self.samples = {task: testbed.tasks.samples(task, n, PROMPT, conditions.generator) for task in TASKS}

    def text(self) -> Iterator[Tensor]:
        """Windows of the training text, the same ones at each call: `[batch, length + 1]`."""
        order = torch.Generator().manual_seed(self.seed)
        return windows(self.tokens, self.batch, self.length, order)

    def train(self, model: nn.Module, batches: Iterator[Tensor], loss: Loss, rate: float) -> float:
        """Train in place, and return the seconds it took, those of writing texts among them."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        start = clock(self.device)
        losses = train(model, optimizer, batches, self.steps, loss=loss, schedule=schedule)
        seconds = clock(self.device) - start
        self.curves["loss over steps"] = list(enumerate(losses, 1))
        return seconds

    def figures(self, model: Decoder, before: Decoder, size: int) -> dict[str, float]:
        """Figures of a model after and before training, with layers of `size` bytes."""
        found = {m: perplexity(m, self.unseen, self.length) for m in (model, before, self.model)}
        weights = sum(layer.weight.numel() for layer in matching(self.model).values())
        subject = self.subject._replace(model=model)
        return {
            "perplexity": found[model],
            "added": math.log(found[model] / found[self.model]),
            "before": found[before],
            "score": statistics.fmean(subject.score(name, samples) for name, samples in self.samples.items()),
            "bits": 8 * size / weights,
            "layer_bytes": size,
        }


def schedule(progress: float) -> float:
    """Factor of the learning rate: from a tenth up over the first tenth of the steps, then down to zero, both on straight lines.

    Examples:
        >>> [round(schedule(x), 2) for x in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.1, 0.55, 1.0, 0.5, 0.0]
    """
    return 0.1 + 9 * progress if progress < 0.1 else (1 - progress) / 0.9


def layer_bytes(model: Decoder) -> int:
    """Bytes that the linear layers hold, packed or not, without the output layer."""
    return sum(
        tensor.nbytes
        for name, layer in model.named_modules()
        if name != "lm_head" and (isinstance(layer, CompressedLinear) or is_linear(layer))
        for tensor in layer.state_dict().values()
    )
