r"""AWQ: scale the weights that meet large activations up before rounding, and undo it where the activations are made.

Source: `awq` (arXiv 2306.00978), Section 3.2 with Eq. (4) and (5); official code
mit-han-lab/llm-awq@d6e797a42b9ef7778de8ee2352116e0f48a78d61, awq/quantize/pre_quant.py (`run_awq`) for the order, and auto_clip.py
(`auto_clip_block`) for what stays unclipped, queries and keys. `refimpl/compression/quantization/scalings.py` has the layers that share
factors, and `activation_aware.py` beside it the searches: 20 exponents, 10 limits, 512 tokens for the limits.

Differs from the paper: grids are those of `rtn`, which contain 0 and have scales in float16, rounded up; the official code's need not,
and clip a group whose weights all lie on one side of 0. The errors of single layers and of clipped groups are computed from their
inputs' second moments, to the same sums. A layer that queries, keys and values share stays unclipped, as in MPT; in BigCode the official code clips it.

Not here: kernels; symmetric grids.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, anatomy, rescale_
from refimpl.compression.block_inputs import Given, block_inputs, hidden_states
from refimpl.compression.blocks import find_blocks
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import CompressedLinear, M, check_layer
from refimpl.compression.quantization.activation_aware import (
    ScaledWeight,
    best_factors,
    clipped,
    half,
    on_grids,
    output_error,
)
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.scalings import Calls, Scaling, calls_of, scalings
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.linear import is_linear, linear_at, sizes, weight_of


@dataclass(frozen=True, kw_only=True)
class AWQ:
    r"""Activation-aware weight quantization of all linear layers of the blocks.

    Args:
        bits: 1 to 8; the paper's are 3 and 4.
        group_size: neighbours in a channel that share a grid, the last group of a channel may be shorter; None is the whole channel.
        scale: search the scales.
        clip: search the clipping limits.
        scale_dtype: what scales are stored in.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = AWQ(group_size=32)(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # 32 x 32 half bytes, 32 scales of two bytes and zero points of a half
        592
    """

    bits: int = 4
    group_size: int | None = 128
    scale: bool = True
    clip: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1, or None for whole channels")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A quantized copy, in evaluation mode; all searches see the activations of the original.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with.

        Raises:
            ValueError: the layout is unknown; there is no calibration data, the model can't take it, or it makes NaN; a weight
                holds NaN.
        """
        batches = batches_of(calibration, "AWQ needs texts to see the activations' sizes")
        small = copy.deepcopy(model).eval()
        parts, name = anatomy(small).blocks, find_blocks(small)[0]
        for i, (part, given) in enumerate(zip(parts, block_inputs(small, name, batches), strict=True)):
            inputs, divided = self.scale_block_(small, part, f"{name}.{i}", given)
            for path in part.linear:
                layer, factor = linear_at(small, path), divided.get(path)
                low = self._quantized(weight_of(layer), inputs[path], clip=path not in (part.q, part.k))
                held = low if factor is None else ScaledWeight(low, factor)
                small.set_submodule(path, CompressedLinear(held, layer.bias))
        return small

    @torch.no_grad()
    def layer(self, weight: Tensor, inputs: Tensor | None = None) -> ScaledWeight:
        """A layer alone, without what precedes it: its inputs are divided at run time.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs.

        Returns:
            Packed codes, scales and zero points, and a factor in 16 bits for each input; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs; weight or inputs are misshapen, or hold NaN or infinity; the weight is too large for
                `scale_dtype`.
        """
        if inputs is None:
            raise ValueError("AWQ needs the layer's inputs: pass `inputs`")
        check_layer(weight, inputs)
        mean = inputs.abs().float().mean(dim=0)
        factor = (
            best_factors(mean, output_error(weight, inputs, self._rounded)) if self.scale else torch.ones_like(mean)
        )
        factor = factor.to(half(weight))
        scaled = (weight.float() * factor.float()).to(weight.dtype)
        return ScaledWeight(self._quantized(scaled, inputs.float() / factor.float()), factor)

    def scale_block_(
        self, model: nn.Module, part: BlockParts, name: str, given: list[Given]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scale the weights of a block, in place. Once the factors that are returned divide, no output has changed.

        Args:
            model: that of the block.
            part: the block's parts.
            name: of the block.
            given: what it is called with, as `block_inputs` gives it.

        Returns:
            Inputs of each linear layer after scaling, `[n, in]`, by name; and factors in 16 bits, `[in]`, of the layers whose inputs
            must be divided at run time.

        Raises:
            ValueError: a layer gets NaN or infinity, or its weight holds some.
        """
        shared = list(scalings(model, part, name)) if self.scale else []
        watched = {*part.linear, *(scaling.around for scaling in shared if scaling.around)}
        calls = calls_of(model, name, watched, given)
        inputs = {path: torch.cat([args[0].flatten(0, -2) for args, _ in calls[path]]) for path in part.linear}
        for path, x in inputs.items():
            if not torch.isfinite(weight_of(linear_at(model, path))).all():
                raise ValueError(f"the weight of layer {path!r} holds NaN or infinity: it can't be compressed")
            if not torch.isfinite(x).all():
                raise ValueError(f"the calibration data makes NaN or infinity in the inputs of layer {path!r}")
        factors, divided = [self._search(model, scaling, inputs, calls) for scaling in shared], {}
        for scaling, factor in zip(shared, factors, strict=True):
            if scaling.feed.producer:
                channels = _channels(model.get_submodule(scaling.feed.producer))
                rescale_(
                    model,
                    scaling.feed,
                    factor.new_ones(channels).index_copy_(0, scaling.feed.source.to(factor.device), factor),
                )
            for path in scaling.feed.consumers:
                if not scaling.feed.producer:
                    weight = weight_of(linear_at(model, path))
                    divided[path] = factor.to(half(weight))
                    factor = divided[path].float()
                    weight.mul_(factor)
                inputs[path] = inputs[path].float() / factor
        return inputs, divided

    def _search(self, model: nn.Module, scaling: Scaling, inputs: dict[str, Tensor], calls: Calls) -> Tensor:
        """The factors of a scaling, `[in]`."""
        layers = [linear_at(model, path) for path in scaling.feed.consumers]
        x = inputs[scaling.feed.consumers[0]]
        mean = x.abs().float().mean(dim=0)
        if scaling.around is None:
            return best_factors(mean, output_error(weight_of(layers[0]), x, self._rounded))
        module, given = model.get_submodule(scaling.around), calls[scaling.around]
        weights = [weight_of(layer).clone() for layer in layers]

        def outputs() -> Iterator[Tensor]:
            return (hidden_states(module(*args, **kwargs)).float() for args, kwargs in given)

        exact = list(outputs())

        def error(factor: Tensor) -> float:
            for layer, weight in zip(layers, weights, strict=True):
                weight_of(layer).copy_(self._rounded(weight.float() * factor) / factor)
            return sum(float((y - z).square().sum()) for y, z in zip(outputs(), exact, strict=True))

        best = best_factors(mean, error)
        for layer, weight in zip(layers, weights, strict=True):
            weight_of(layer).copy_(weight)
        return best

    def _rounded(self, weight: Tensor) -> Tensor:
        """A weight on its grids, `[out, in]`, float32."""
        return on_grids(weight, self.bits, self._size(weight), self.scale_dtype)

    def _quantized(self, weight: Tensor, inputs: Tensor, *, clip: bool = True) -> QuantizedWeight:
        if self.clip and clip:
            weight = clipped(weight, inputs, self.bits, self._size(weight), self.scale_dtype)
        return RTN(bits=self.bits, group_size=self._size(weight), scale_dtype=self.scale_dtype)(weight)

    def _size(self, weight: Tensor) -> int:
        return weight.shape[1] if self.group_size is None else min(self.group_size, weight.shape[1])


def _channels(producer: nn.Module) -> int:
    return sizes(producer)[0] if is_linear(producer) else len(producer.weight)  # type: ignore[arg-type]
