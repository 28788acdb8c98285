r"""Few bits for the weights of a trained model: what does training through the rounding win over rounding, and what does it cost?

The substrate is the testbed's model, or a checkpoint of the user's, in float32. A method that trains gets 60 steps of 4 x 128 tokens
of the testbed's training text (2 of 2 x 32 in the quick form), or of what its own sampling gives, with AdamW and one learning rate that
falls to zero; a method that rounds gets the model as it is, and as much text for calibration. Both are measured by what is packed in the
end, on text that the model has not seen. The baseline is the model trained as long in full precision: what more training alone brings.
"""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.compression.protocol import CompressedLinear, apply, matching
from refimpl.model.linear import is_linear
from refimpl.model.model import Decoder
from refimpl.model.train import Loss, next_token_loss, perplexity, train, windows

STEPS, BATCH, LENGTH, RATE = 60, 4, 128, 1e-3
QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH = 2, 2, 32
TEXT, QUICK_TEXT = 100_000, 20_000  # tokens that batches are cut from
UNSEEN, QUICK_UNSEEN = 8_192, 256  # tokens that the figures are measured on

ABOUT = (
    "The testbed's model at few bits, trained through its quantization on 31,000 tokens or rounded as it is: perplexity of what is "
    "packed on unseen text, before and after training, bits really held, and seconds."
)
VERSION = 1
METRICS = (
    Metric("perplexity", "on unseen text, packed", "lower"),
    Metric("before", "perplexity before any training, packed", "lower"),
    Metric("bits", "per weight of the linear layers, scales included", "lower"),
    Metric("layer_bytes", "bytes of linear layers, without the output layer", "lower"),
    Metric("seconds", "seconds of training, or of rounding", "lower", exact=False),
    Metric("seconds_per_step", "seconds of a step of training", "lower", exact=False),
)
BASELINE = "full precision, trained as long"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


def baseline(conditions: Conditions) -> dict[str, float]:
    """The model trained in float32; its layers are counted in 16 bits."""
    given = Given(conditions)
    model = copy.deepcopy(given.model)
    seconds = given.train(model, given.text(), next_token_loss)
    size = sum(2 * layer.weight.numel() for layer in matching(model).values())
    return given.figures(model.eval(), given.model, size, seconds, given.steps)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The model trained by `implementation(**settings)` where that has `prepare`, otherwise compressed by it."""
    method = implementation(**settings)
    given = Given(conditions)
    if not hasattr(method, "prepare"):
        calibration = [batch[:, :-1] for batch in islice(given.text(), given.steps)]
        start = clock(conditions.device)
        small = apply(method, given.model, calibration)
        return given.figures(small, small, layer_bytes(small), clock(conditions.device) - start, 0)
    student = method.prepare(given.model)
    with torch.no_grad():
        student(next(given.text())[:, :-1])  # places the grids of activations
    before = method.convert(student)
    drawn = torch.Generator().manual_seed(given.seed)
    batches = method.batches(given.model, given.tokens, given.batch, given.length, drawn)
    seconds = given.train(student, batches, lambda model, batch: method.loss(model, given.model, batch))
    small = method.convert(student)
    return given.figures(small, before, layer_bytes(small), seconds, given.steps)


class Given:
    """The substrate: a model, texts, and the order in which they are shown, drawn from the seed.

    Args:
        conditions: of the cell.
    """

    def __init__(self, conditions: Conditions) -> None:
        quick, self.device, self.curves = conditions.quick, conditions.device, conditions.curves
        subject = testbed.subject(conditions.model, self.device)
        self.model = subject.model.eval()
        self.steps, self.batch, self.length = (
            (QUICK_STEPS, QUICK_BATCH, QUICK_LENGTH) if quick else (STEPS, BATCH, LENGTH)
        )
        self.tokens = subject.text("train", QUICK_TEXT if quick else TEXT).to(self.device)
        self.unseen = subject.text("held-out", QUICK_UNSEEN if quick else UNSEEN).to(self.device)
        self.seed = int(torch.randint(2**31, (), generator=conditions.generator))

    def text(self) -> Iterator[Tensor]:
        """Windows of the training text, the same ones at each call: `[batch, length + 1]`."""
        order = torch.Generator().manual_seed(self.seed)
        return windows(self.tokens, self.batch, self.length, order)

    def train(self, model: nn.Module, batches: Iterator[Tensor], loss: Loss) -> float:
        """Train in place, and return the seconds it took, those of writing texts among them."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        start = clock(self.device)
        losses = train(model, optimizer, batches, self.steps, loss=loss, schedule=lambda progress: 1 - progress)
        seconds = clock(self.device) - start
        self.curves["loss over steps"] = list(enumerate(losses, 1))
        return seconds

    def figures(self, model: Decoder, before: Decoder, size: int, seconds: float, steps: int) -> dict[str, float]:
        """Figures of a model after and before training, with layers of `size` bytes."""
        perplexities = [perplexity(m, self.unseen, self.length) for m in (model, before)]
        weights = sum(layer.weight.numel() for layer in matching(self.model).values())
        return {
            "perplexity": perplexities[0],
            "before": perplexities[1],
            "bits": 8 * size / weights,
            "layer_bytes": size,
            "seconds": seconds,
            "seconds_per_step": seconds / steps if steps else 0.0,
        }


def layer_bytes(model: Decoder) -> int:
    """Bytes that the linear layers hold, packed or not, without the output layer."""
    return sum(
        tensor.nbytes
        for name, layer in model.named_modules()
        if name != "lm_head" and (isinstance(layer, CompressedLinear) or is_linear(layer))
        for tensor in layer.state_dict().values()
    )
