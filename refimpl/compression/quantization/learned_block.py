r"""A block of a model whose weights and activations are rounded, as something that is learned: clipping, shifts and scales.

Source: `omniquant` (arXiv 2308.13137), Eq. (1), and Section 3.3 for which activations are rounded; official code
OpenGVLab/OmniQuant@95fae1bd00eaa60d03a20eb39c76c4cb173f51f7, models/int_opt_layer.py and int_llama_layer.py.

Differs from the paper: queries and keys are rounded before rotary positions turn them, there after.

Not here: rounded attention probabilities, which the official code leaves in 16 bits too.
"""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from refimpl.compression.anatomy import BlockParts
from refimpl.compression.block_inputs import hidden_states, to_float
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, check_layer
from refimpl.compression.quantization.activations import Activations
from refimpl.compression.quantization.learned_clipping import LearnedClipping, rounded
from refimpl.compression.quantization.learned_transform import LearnedTransform
from refimpl.model.linear import is_transposed, linear_at, weight_of


class LearnedBlock:
    """A block, what it learns, and what it becomes.

    Args:
        model: a decoder.
        name: of one of its blocks.
        part: the names of that block's modules.
        bits: of weights.
        group_size: of weights' grids, see `LearnedClipping`.
        activation_bits: of the inputs of linear layers and of queries, keys and values; None leaves them.
        transform: the block's shifts and scales; None for none.

    Raises:
        ValueError: a layer is compressed already, or holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        part: BlockParts,
        *,
        bits: int,
        group_size: int | None,
        activation_bits: int | None,
        transform: LearnedTransform | None,
    ) -> None:
        self.model, self.name, self.part, self.transform = model, name, part, transform
        self.activations = None if activation_bits is None else Activations(bits=activation_bits, symmetric=False)
        self.layers = {layer: linear_at(model, layer) for layer in part.linear}
        self.tensors: dict[str, Tensor] = {}  # float32, weights as `[out, in]`
        self.clippings: dict[str, LearnedClipping] = {}
        for norm in (part.attention_norm, part.feed_forward_norm):
            for key, parameter in model.get_submodule(norm).named_parameters():
                self.tensors[f"{norm}.{key}"] = parameter.detach().float()
        for place, layer in self.layers.items():
            check_layer(weight_of(layer))
            self.tensors[f"{place}.weight"] = weight = weight_of(layer).float()
            if layer.bias is not None:
                self.tensors[f"{place}.bias"] = layer.bias.detach().float()
            elif transform is not None and transform.shifted:
                self.tensors[f"{place}.bias"] = weight.new_zeros(len(weight))
            clipping = LearnedClipping((weight.shape[0], weight.shape[1]), bits, group_size)
            self.clippings[place] = clipping.to(weight.device)

    def clipping_parameters(self) -> list[nn.Parameter]:
        """What is learned of the clipping."""
        return [parameter for clipping in self.clippings.values() for parameter in clipping.parameters()]

    def transform_parameters(self) -> list[nn.Parameter]:
        """What is learned of shifts and scales."""
        found = [] if self.transform is None else self.transform.parameters()
        return [parameter for parameter in found if parameter.requires_grad]

    def student(self, hooks: ExitStack) -> "Student":
        """The block as it is trained, in float32: called as the block is, it returns hidden states, with gradients.

        Args:
            hooks: what rounds activations, until it is left.
        """
        block = copy.deepcopy(self.model.get_submodule(self.name)).float().requires_grad_(False)
        if self.activations is not None:
            for layer in self.layers:
                place, width = block.get_submodule(layer.removeprefix(f"{self.name}.")), self.width(layer)
                hooks.enter_context(place.register_forward_pre_hook(lambda _m, args: (self._read(args[0]),)))
                if width:
                    hooks.enter_context(place.register_forward_hook(partial(self._round_output, width=width)))
        return Student(self, block)

    def transformed(self) -> dict[str, Tensor]:
        """Weights and biases after shifts and scales, before rounding."""
        return self.tensors if self.transform is None else self.transform(self.tensors)

    @torch.no_grad()
    def install_(self) -> None:
        """Put the quantized layers in the model, and shifts and scales in its norms."""
        made = self.transformed()
        for place, old in self.layers.items():
            held = self.clippings[place].held(made[f"{place}.weight"], old.weight.dtype, self.activations)
            bias, width = made.get(f"{place}.bias"), self.width(place)
            bias = None if bias is None else bias.to(old.weight.dtype)
            packed = CompressedLinear(held, bias)
            if width and self.activations is not None:
                packed = RoundedLinear(held, bias, width, self.activations.bits)
            self.model.set_submodule(place, packed)
        for norm in (self.part.attention_norm, self.part.feed_forward_norm):
            for key, parameter in self.model.get_submodule(norm).named_parameters():
                parameter.copy_(made[f"{norm}.{key}"])

    def width(self, layer: str) -> int:
        """Channels of queries, keys or values that share a grid: of all heads, of one where positions are rotary; 0 elsewhere."""
        if layer not in (self.part.q, self.part.k, self.part.v):
            return 0
        return self.part.head_dim * (self.part.n_heads if self.part.gate is None else 1)

    def _round_output(self, _module: nn.Module, _args: Any, output: Tensor, *, width: int) -> Tensor:
        return self._read(torch.unflatten(output, -1, (-1, width))).flatten(-2)

    def _read(self, x: Tensor) -> Tensor:
        """Activations as they are read, a grid for each row, with gradients."""
        assert self.activations is not None
        rows = x.flatten(0, -2)
        return rounded(rows, rows.amin(dim=1), rows.amax(dim=1), self.activations.bits, torch.float32).view_as(x)


class Student:
    """A block that takes its tensors anew at each call.

    Args:
        learned: what is learned of it.
        block: a copy of it, in float32.
    """

    def __init__(self, learned: LearnedBlock, block: nn.Module) -> None:
        self.learned, self.block = learned, block

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        output = functional_call(self.block, self.tensors(), (x.float(), *to_float(args)), to_float(kwargs))
        return hidden_states(output)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names in the block, weights rounded, and as their layers keep them."""
        replaced = {}
        for name, tensor in self.learned.transformed().items():
            layer, _, kind = name.rpartition(".")
            inside = name.removeprefix(f"{self.learned.name}.")
            replaced[inside] = tensor
            if kind == "weight" and layer in self.learned.clippings:
                weight = self.learned.clippings[layer](tensor)
                replaced[inside] = weight.T if is_transposed(self.learned.layers[layer]) else weight
        return replaced


class RoundedLinear(CompressedLinear):
    """A layer of queries, keys or values whose outputs are rounded too.

    Args:
        compressed: the weight.
        bias: `[out]`, copied.
        width: neighbours of an output that share a grid.
        bits: 2 to 8, of their asymmetric grids.
    """

    def __init__(self, compressed: CompressedWeight, bias: Tensor | None, width: int, bits: int) -> None:
        super().__init__(compressed, bias)
        self.width, self.bits = width, bits

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        output = super().forward(inputs)
        grids = Activations(bits=self.bits, symmetric=False)
        codes, scale = grids.quantize(torch.unflatten(output, -1, (-1, self.width)))
        return (codes * scale).to(output.dtype).flatten(-2)
