r"""What all methods share that train a model with its quantization in the forward pass.

Glossary
    weight      $W$, `[out, in]`, the master copy that training updates, in the layer's own dtype
    rounded     $\hat W$, `[out, in]`, what the forward pass multiplies by; gradients reach the master copy through the rounding
    read        what the product sees of a layer's inputs `[..., in]`: their quantized values, or themselves
    write       what follows sees of its outputs `[..., out]`: rounded where they are held in a cache, or as they are
    teacher     the model that `prepare` was given, for methods that learn from it; never changed
    bits        of a code; scales and zero points are counted in `nbytes` beside them

A method is a frozen dataclass of settings. Its calls stand around a training loop of your own:

    prepare(model)                                      a copy whose linear layers are `FakeLinear`, in training mode
    batches(teacher, text, batch, length, generator)    what to learn from, `[batch, length + 1]` tokens each; the text as it is
    loss(student, teacher, batch)                       what to lower, a scalar; the text's own cross-entropy
    convert(model)                                      a copy that holds packed integers, in evaluation mode

A master copy in 16 bits loses small steps: `model.float()` first. Layers are those that `compress` would take: all linear layers
but the output, tied weights left alone.

Examples:
    >>> from refimpl.compression.quantization.qat.ste_qat import STEQAT
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder, initialize_
    >>> from refimpl.model.train import train
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> generator = torch.Generator().manual_seed(0)
    >>> teacher, text = initialize_(Decoder(config), generator), torch.arange(500) % 61
    >>> method = STEQAT(bits=2, group_size=16, activation_bits=None)
    >>> student = method.prepare(teacher)
    >>> batches = method.batches(teacher, text, batch=4, length=20, generator=generator)
    >>> optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    >>> losses = train(student, optimizer, batches, 20, loss=lambda model, batch: method.loss(model, teacher, batch))
    >>> small = method.convert(student)
    >>> losses[-1] < losses[0], small.layers[0].feed_forward.up_proj.compressed.nbytes  # 2 bits, and scale and zero point
    (True, 500)

Invariants, run for every method by `tests/compression/quantization/qat/test_protocol.py`: the model given is not written, by
`prepare`, by training, nor by `convert`; a gradient reaches every parameter; training lowers the loss of the model that
`convert` gives; that model computes what the trained one computed, to rounding; it holds packed codes and no master copy; a
batch equals its rows, decoding with a cache equals reading at once; saving and loading is the identity, in a folder too
(`refimpl.compression.folder`); the same seed gives the same model.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.protocol import CompressedLinear, CompressedWeight, M, check_layer, matching
from refimpl.model.linear import weight_of
from refimpl.model.train import windows


class FakeLinear(nn.Module, ABC):
    """A linear layer whose weight, and whose inputs where the method says so, are rounded at each call.

    Args:
        layer: copied; what of it is trained is trained here.

    Raises:
        ValueError: its weight is empty, or holds NaN or infinity.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        check_layer(weight_of(layer))
        self.weight = nn.Parameter(weight_of(layer).clone().contiguous(), layer.weight.requires_grad)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)

    @abstractmethod
    def rounded(self) -> Tensor:
        r"""$\hat W$, `[out, in]`, in the weight's dtype, with a gradient to the weight."""

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]` as the product sees them, with a gradient; themselves, where they are not quantized."""
        return inputs

    def write(self, outputs: Tensor) -> Tensor:
        """The outputs `[..., out]` as what follows sees them, with a gradient; themselves, as a rule."""
        return outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.write(F.linear(self.read(inputs), self.rounded(), self.bias))

    @abstractmethod
    def held(self) -> CompressedWeight:
        """The weight, and how inputs are quantized, as they are stored."""

    def packed(self) -> nn.Module:
        """The layer that takes this one's place when training is done."""
        return CompressedLinear(self.held(), self.bias)


class QAT(ABC):
    """A method: a frozen dataclass of settings."""

    skip: ClassVar[tuple[str, ...]] = ("lm_head",)

    @abstractmethod
    def replacements(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> Mapping[nn.Module, nn.Module]:
        """What takes the place of which of the model's modules: of each layer, by its name, a `FakeLinear`."""

    def prepare(self, model: M, *, target: Sequence[str] = ("*",), skip: Sequence[str] | None = None) -> M:
        """A copy whose linear layers round what they multiply, in training mode.

        Args:
            model: left unchanged.
            target: patterns of the whole names of layers to quantize, as in a shell.
            skip: patterns of those to leave; None stands for the method's own, as a rule the output layer.

        Raises:
            ValueError: no layer matches, or one is compressed or prepared already, is empty, or holds integers, NaN or infinity.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, FakeLinear):
                raise ValueError(f"layer {name!r} is prepared already: train it, or start from the original model")
        layers = matching(model, target, self.skip if skip is None else skip)
        return exchanged(model, self.replacements(model, layers)).train()

    def batches(
        self,
        teacher: nn.Module,  # noqa: ARG002 - for those that let it write
        text: Tensor | None,
        batch: int,
        length: int,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """What to learn from, for ever: `[batch, length + 1]` tokens, the last one being target only.

        Args:
            teacher: the model as it was.
            text: `[n]` tokens; a data-free method takes None.
            batch: rows.
            length: tokens of a row.
            generator: of what is drawn, on the CPU.

        Raises:
            ValueError: there is no text, or it is shorter than a row.
        """
        if text is None:
            raise ValueError(f"text=None: {type(self).__name__} learns from text; pass its tokens, `[n]`")
        return windows(text, batch, length, generator)

    def loss(self, student: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:  # noqa: ARG002 - as above
        """What training lowers, over a batch `[batch, time + 1]`: the mean cross-entropy of its tokens, in nats."""
        return F.cross_entropy(logits_of(student, batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def convert(self, model: M) -> M:
        """A copy that holds packed integers in the place of the master copies, in evaluation mode.

        Args:
            model: what `prepare` gave, trained or not; left unchanged, so that training may go on.

        Raises:
            ValueError: there is no layer that `prepare` made, or one can't be stored yet.
        """
        fakes = [module for module in model.modules() if isinstance(module, FakeLinear)]
        if not fakes:
            raise ValueError(
                f"{type(model).__name__} has no layer to convert: call `prepare` first, and train what it returns"
            )
        return exchanged(model, {fake: fake.packed() for fake in fakes}).eval()


def exchanged(model: M, modules: Mapping[nn.Module, nn.Module]) -> M:
    """A copy of a model in which modules stand for others; those that they replace are not copied.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> exchanged(model, {model[0]: nn.Identity()}), len(list(model.parameters()))
        (Sequential(
          (0): Identity()
          (1): ReLU()
        ), 2)
    """
    return copy.deepcopy(model, {id(old): new for old, new in modules.items()})


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[batch, time, vocabulary]` of a model that returns them, or an object that has them, as transformers' do."""
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits
