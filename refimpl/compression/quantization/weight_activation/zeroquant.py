r"""ZeroQuant: weights in groups of rows, activations token by token, and each block distilled from its own original.

Source: `zeroquant` (arXiv 2206.01861), Section 4.1 for the granularities, Section 4.2 for layer-by-layer knowledge distillation
(LKD); official code deepspeedai/DeepSpeed@edaa7221267243c7be7fb49c5d5f5c4fb97b4641, deepspeed/compression/basic_layer.py and
utils.py; for LKD microsoft/DeepSpeedExamples@83757d9c937daabd1089a08051061706cb73900d, compression/bert/run_glue_lkd.py,
of which steps, learning rate and the bits of both kinds of layers are the defaults (zero_quant_lkd.sh).

Differs from the paper: the outermost level of a grid is the largest magnitude, $m = 2^{bits-1} - 1$ steps away from 0; in the
official code it is $2^{bits-1}$ steps away, and clipped to one less above 0. A group is a whole number of rows, the last may have
fewer. Scales are held for each row, as the product's last step wants them. LKD goes through the calibration batches in
order, again from the first where they are fewer than the steps; the official script draws new ones. AdamW decays no weight; the
script leaves its default of 0.01 in place. Inputs of all layers have 8 bits, as in the paper; the script's configuration quantizes
attention's only.

Not here: fused kernels; quantized embeddings; 16-bit activations for queries, keys and values (W4/8A8/16); a mask of padding in
the loss.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, anatomy
from refimpl.compression.block_inputs import Given, block_inputs, hidden_states, to_float
from refimpl.compression.blocks import find_blocks
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import CompressedLinear, M, check_layer
from refimpl.compression.quantization.activations import Activations, IntegerWeight, absmax_scale
from refimpl.model.linear import linear_at, weight_of

ACTIVATION_BITS = 8


@dataclass(frozen=True, kw_only=True)
class ZeroQuant:
    """Group-wise weights and token-wise activations, with layer-by-layer distillation.

    Args:
        bits: of the feed-forward's weights, 2 to 8; the official W8A8 is 8 here, with `steps=0`.
        attention_bits: of the attention's weights, 2 to 8. Activations have 8 bits.
        groups: in a weight, each of whole rows with one scale; where there are fewer rows, each has its own. The official
            configurations have 48 for BERT base and 64 for GPT-2.
        steps: of distillation for each block; 0 is ZeroQuant without it, which needs no data.
        learning_rate: of AdamW, without weight decay.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = ZeroQuant(groups=4, steps=2)(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # 32 x 32 bytes, and a scale of four bytes for each row
        1152
        >>> small.layers[0].feed_forward.up_proj.compressed.nbytes  # 40 x 32 half bytes, and the scales
        800
    """

    bits: int = 4
    attention_bits: int = 8
    groups: int = 64
    steps: int = 100
    learning_rate: float = 5e-6

    def __post_init__(self) -> None:
        for name in ("bits", "attention_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be 2 to 8")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1, which is one scale for the whole weight")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 (no distillation) or more; the official script takes 100")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0; the official script takes 5e-6")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A quantized copy, in evaluation mode.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with;
                a step takes one. Not used where `steps` is 0.

        Raises:
            ValueError: the layout is unknown; there are steps and no calibration data, the model can't take it, or it makes NaN.
        """
        batches = batches_of(calibration) if self.steps else []
        if self.steps and not batches:
            raise ValueError(f"steps={self.steps} of distillation need texts: pass `calibration`, or steps=0")
        small = copy.deepcopy(model).eval()
        name, blocks = find_blocks(small)
        parts = anatomy(small).blocks
        for i, given in enumerate(block_inputs(small, name, batches) if batches else [[]] * len(blocks)):
            self._compress(blocks[i], f"{name}.{i}.", parts[i], given)
        return small

    def _compress(self, block: nn.Module, prefix: str, part: BlockParts, given: list[Given]) -> None:
        """Replace a block's linear layers, distilled where there is data, in place."""
        bits = {
            layer.removeprefix(prefix): self.attention_bits if layer in (part.q, part.k, part.v, part.o) else self.bits
            for layer in part.linear
        }
        dtypes = {name: weight_of(linear_at(block, name)).dtype for name in bits}
        learners = {name: Learner(linear_at(block, name), width, self.groups) for name, width in bits.items()}
        if given:
            self._distil(block, learners, given, prefix)
        for name, learner in learners.items():
            before = linear_at(block, name)
            bias = None if learner.bias is None else learner.bias.detach().to(before.bias.dtype)
            block.set_submodule(name, CompressedLinear(learner.held(dtypes[name]), bias))

    def _distil(self, block: nn.Module, learners: "dict[str, Learner]", given: list[Given], where: str) -> None:
        r"""Train the quantized block towards $\|L_k(x) - \hat L_k(x)\|^2$, and put what is not a linear layer back in the block.

        Weights, biases and norms learn, in float32.
        """
        student = copy.deepcopy(block).float()
        for name, learner in learners.items():
            student.set_submodule(name, learner)
        optimizer = torch.optim.AdamW(
            student.requires_grad_(True).parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True
        )
        with torch.enable_grad():
            for x, y, args, kwargs in islice(cycle(given), self.steps):
                if not torch.isfinite(y).all():
                    raise ValueError(
                        f"the calibration data makes NaN or infinity in the output of block {where[:-1]!r}"
                    )
                loss = F.mse_loss(hidden_states(student(x.float(), *to_float(args), **to_float(kwargs))), y.float())
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[0] not in learners:
                parameter.copy_(student.get_parameter(name))


class Learner(nn.Module):
    """A linear layer that rounds its weight and its inputs at each call, with gradients as if it did not (straight-through).

    Args:
        layer: copied, in float32.
        bits: of the weight.
        groups: of the weight.
    """

    def __init__(self, layer: nn.Linear, bits: int, groups: int) -> None:
        super().__init__()
        check_layer(weight_of(layer))
        self.bits, self.groups, self.activations = bits, groups, Activations(bits=ACTIVATION_BITS)
        self.weight = nn.Parameter(weight_of(layer).float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        integers, scale = group_round(self.weight.detach(), self.bits, self.groups)
        codes, step = self.activations.quantize(x.detach())
        w = self.weight + (integers * scale[:, None] - self.weight.detach())
        return F.linear(x + (codes * step - x.detach()), w, self.bias)

    def held(self, dtype: torch.dtype) -> IntegerWeight:
        """The weight as integers; `dense()` has the dtype."""
        integers, scale = group_round(self.weight.detach(), self.bits, self.groups)
        return IntegerWeight(
            integers.add_(2 ** (self.bits - 1)).to(torch.uint8),
            scale,
            None,
            bits=self.bits,
            granularity="channel",
            shape=(integers.shape[0], integers.shape[1]),
            dtype=dtype,
            activations=self.activations,
        )


def group_round(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Round a weight on the grids of its groups of rows.

    Args:
        weight: `[out, in]`.
        bits: 2 to 8.
        groups: of ceil(out / groups) rows each, the last may have fewer.

    Returns:
        `[out, in]`, float32 holding integers; the scale of each row, `[out]`, float32, equal in a group.

    Examples:
        >>> group_round(torch.tensor([[3.0], [1.4], [30.0]]), 3, 2)
        (tensor([[3.],
                [1.],
                [3.]]), tensor([ 1.,  1., 10.]))
    """
    rows = -(-len(weight) // groups)
    largest = F.pad(weight.abs().amax(dim=1).float(), (0, -len(weight) % rows)).view(-1, rows).amax(dim=1)
    scale = absmax_scale(largest, bits).repeat_interleave(rows)[: len(weight)]
    return (weight.float() / scale[:, None]).round_(), scale
