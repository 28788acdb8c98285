r"""A whole model, compressed: what does it still know, what can it still do, and how many bytes does it hold?

The substrate is the testbed's model, or a checkpoint of the user's, in bfloat16. Methods of both kinds meet the same calibration
windows of training text; what they leave is read in bfloat16 too. Layer methods compress every linear layer but the output.
"""

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, apply
from refimpl.memory import peak_of
from refimpl.model.linear import is_linear
from refimpl.model.model import Decoder
from refimpl.model.train import perplexity
from refimpl.testbed.sample import Sample

LENGTH = 256  # tokens of a window of text, and of a task's example
TEXT = 50_000  # tokens of training text that calibration windows are cut from
TASKS = ("single_doc_qa", "few_shot", "retrieval")

ABOUT = (
    "The testbed's model in 16 bit, compressed with 64 windows of 256 tokens of training text: perplexity on held-out text, "
    "mean score on three tasks, bytes held, and the time and memory that compressing takes. `bits` are those of a weight's code. "
    "What shares a grid is 32 neighbours in a row where a method has such groups; it is a row in OBQ, QuaRot, LLM.int8() and "
    "Outlier Suppression+, several rows in ZeroQuant, a cluster of a row's columns in RPTQ, the whole weight in KL clipping, "
    "SmoothQuant and QuIP. Scales are among the bytes, so that the difference shows. Activations stay in 16 bit, but for "
    "SmoothQuant and Outlier Suppression+ (as many bits as weights), LLM.int8() and ZeroQuant (8, like ZeroQuant's attention "
    "weights), QuaRot and RPTQ (4; behind norms RPTQ's have 8)."
)
VERSION = 2
METRICS = (
    Metric("perplexity", "per token of held-out text", "lower"),
    Metric("score", "mean of three tasks, 0 to 1", "higher"),
    Metric("layer_bytes", "bytes of linear layers, without the output layer", "lower"),
    Metric("bytes", "bytes of the whole model", "lower"),
    Metric("compression", "times fewer bytes than the whole model in 16 bit", "higher"),
    Metric("seconds", "seconds to compress", "lower", exact=False),
    Metric("peak_bytes", "bytes that compressing takes at its peak, beside the model itself", "lower", exact=False),
)
BASELINE = "16 bit"
AXES: dict[str, tuple[Any, ...]] = {}
QUICK: dict[str, tuple[Any, ...]] = {}


@dataclass(frozen=True)
class Substrate:
    """A model and what it is calibrated and measured on."""

    subject: testbed.Subject
    calibration: list[Tensor]  # batches [8, LENGTH]
    held_out: Tensor  # [tokens]
    samples: dict[str, list[Sample]]


def substrate(conditions: Conditions) -> Substrate:
    """The model, windows of training text, held-out text and examples of the tasks; all drawn from the seed.

    Raises:
        FileNotFoundError: the folder of the user's model is not there.
        ValueError: it is none that `refimpl.model` reads.
    """
    subject = testbed.subject(conditions.model, conditions.device, torch.bfloat16)
    windows, n = (8, 4) if conditions.quick else (64, 24)
    train, held_out = subject.text("train", TEXT), subject.text("held-out", windows * LENGTH)
    starts = torch.randint(len(train) - LENGTH, (windows, 1), generator=conditions.generator)
    calibration = train[starts + torch.arange(LENGTH)].to(conditions.device)
    samples = {task: testbed.tasks.samples(task, n, LENGTH, conditions.generator) for task in TASKS}
    return Substrate(subject, list(torch.split(calibration, 8)), held_out.to(conditions.device), samples)


def baseline(conditions: Conditions) -> dict[str, float]:
    """The model as it is, in bfloat16."""
    given = substrate(conditions)
    start = clock(conditions.device)
    with peak_of(conditions.device) as peak:
        model = copy.deepcopy(given.subject.model)
    return _figures(given, model, clock(conditions.device) - start, peak.bytes)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The model compressed by `implementation(**settings)`."""
    method = implementation(**settings)
    given = substrate(conditions)
    start = clock(conditions.device)
    with peak_of(conditions.device) as peak:
        model = apply(method, given.subject.model, given.calibration)
    return _figures(given, model, clock(conditions.device) - start, peak.bytes)


@torch.no_grad()
def _figures(given: Substrate, model: Decoder, seconds: float, peak_bytes: int) -> dict[str, float]:
    held = stored_bytes(model)
    layer_bytes = sum(
        stored_bytes(layer)
        for name, layer in model.named_modules()
        if name != "lm_head" and (isinstance(layer, CompressedLinear) or is_linear(layer))
    )
    model = _unpacked(model)
    subject = given.subject._replace(model=model)
    return {
        "perplexity": perplexity(model, given.held_out, LENGTH),
        "score": statistics.fmean(subject.score(name, samples) for name, samples in given.samples.items()),
        "layer_bytes": layer_bytes,
        "bytes": held,
        "compression": stored_bytes(given.subject.model) / held,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
    }


def stored_bytes(module: nn.Module) -> int:
    """Bytes of what a module's state holds, each storage once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in module.state_dict().values()}.values())


def _unpacked(model: Decoder) -> Decoder:
    """The same products from dense weights, so that reading many texts does not unpack each weight for each of them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear) and type(layer.compressed).multiply is CompressedWeight.multiply:
            model.set_submodule(name, _Unpacked(layer))
    return model


class _Unpacked(nn.Module):
    """A compressed layer with its dense weight at hand."""

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        self.read, self.weight, self.bias = layer.compressed.read, layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.read(inputs), self.weight, self.bias)
