r"""QuaRot: turn the stream, values, keys and the inside of the feed-forward by Hadamard matrices, then quantize all of it to 4 bits.

Source: `quarot` (arXiv 2404.00456), Section 4: stages 1a (stream), 1b (feed-forward), 1c (values), 1d (keys), 2a to 2c (weights,
activations, cache), Section 5 (Setup) for grids and clipping; official code spcl/QuaRot@5008669b08c1f11f9b64d52d16fddd47ca754c5a,
fake_quant/rotation_utils.py, quant_utils.py, main.py.

Differs from the paper: sizes without a Hadamard matrix are turned by a product with a random orthogonal one (`hadamard`). Keys are turned
back when they are read, instead of the queries with them (`quantized_attention`). A weight's step is rounded to float16 before it
is judged; as in the official code, the power of its error is 2.4, where the paper has the square. Activations use the levels -7 to
7, where the official code has -8 too. The cache is quantized in `refimpl.model`'s decoder only: the attention of transformers'
models can't be entered between rotation and cache, so there keys and values stay as they are. Embedding and output layer stay in
16 bit, as in the paper.

Not here: integer kernels; groups inside of a channel; a random rotation instead of Hadamard's.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts
from refimpl.compression.calibration import batches_of, inputs_by_group
from refimpl.compression.hadamard import turn, turn_across
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, M
from refimpl.compression.quantization.activations import Activations
from refimpl.compression.quantization.affine import affine_grid, nearest, quantize
from refimpl.compression.quantization.grid_search import NORM
from refimpl.compression.quantization.observers import best_range
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.quantized_attention import QuantizedAttention
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.rotation import fold_norms_, rotate_stream_
from refimpl.model.linear import weight_of
from refimpl.model.model import Attention


@dataclass(frozen=True, kw_only=True)
class QuaRot:
    r"""4 bits for weights, activations and cache, after rotations that leave the model's function as it is.

    Args:
        weights: how weights are rounded: by `gptq`, with calibration data, or each to its nearest level (`rtn`), without.
        bits: of weights, 2 to 8; a symmetric grid for each channel, clipped where a search finds it best.
        activation_bits: of the inputs of all linear layers in blocks, 2 to 8; a symmetric grid for each token. None leaves them.
        cache_bits: of keys and values, 1 to 8; a grid for each head of a token, or for 128 of its channels where they divide it.
            None leaves them; so does a model of transformers.
        clip: share of a token's largest magnitude that its grid covers.
        seed: of the signs in the stream's rotation.

    Examples:
        >>> from refimpl.model.cache import FullCache
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small, cache = QuaRot(weights="rtn")(model), FullCache()
        >>> small(torch.arange(5)[None], cache).shape, cache.nbytes  # two layers, keys and values, 5 tokens, 2 heads of 4 + 3 bytes
        (torch.Size([1, 5, 61]), 280)
    """

    weights: Literal["gptq", "rtn"] = "gptq"
    bits: int = 4
    activation_bits: int | None = 4
    cache_bits: int | None = 4
    clip: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in ("gptq", "rtn"):
            raise ValueError(f"weights={self.weights!r} must be 'gptq' or 'rtn'")
        for name, bits, least in (("bits", self.bits, 2), ("cache_bits", self.cache_bits, 1)):
            if bits is not None and not least <= bits <= 8:
                raise ValueError(f"{name}={bits} must be {least} to 8")
        Activations(bits=self.activation_bits or 8, clip=self.clip)  # checks both

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A rotated and quantized copy, in evaluation mode.

        Args:
            model: one that `anatomy` knows; left unchanged.
            calibration: batches of text for GPTQ, each a tensor of tokens or a dict of keyword arguments that the model is called
                with; every position counts, padding too. `weights="rtn"` ignores it.

        Raises:
            ValueError: `anatomy` does not know the model, or its stream can't be turned; GPTQ has no calibration data, or the model
                can't take it.
        """
        batches = batches_of(calibration)
        if self.weights == "gptq" and not batches:
            raise ValueError("weights='gptq' needs texts: pass `calibration`, or take weights='rtn'")
        small, layers = rotated(model, self.seed)
        self.quantize_(small, layers, batches)
        return small

    def quantize_(self, model: nn.Module, layers: Iterable[str], batches: list[Any]) -> None:
        """Stages 2a to 2c, in place: weights layer by layer while activations are whole, then activations and cache.

        Args:
            model: turned already, or as it was.
            layers: names of the linear layers.
            batches: calibration data.
        """
        modules = {name: model.get_submodule(name) for name in layers}
        groups = inputs_by_group(model, modules, batches) if self.weights == "gptq" else (([n], None) for n in modules)
        packed = []
        for names, inputs in groups:
            for name in names:
                layer: Any = modules[name]
                over = layer.over if isinstance(layer, RotatedLinear) else 1
                seen = None if inputs is None else turn_across(inputs, over)
                packed.append(RotatedWeight(self._stored(weight_of(layer), seen), over, self.clip))
                model.set_submodule(name, CompressedLinear(packed[-1], layer.bias))
        for weight in packed:
            weight.activation_bits = self.activation_bits
        if self.cache_bits is not None:
            for name, module in list(model.named_modules()):
                if type(module) is Attention:
                    model.set_submodule(name, QuantizedAttention.of(module, self.cache_bits))

    def _stored(self, weight: Tensor, inputs: Tensor | None) -> QuantizedWeight:
        """A weight on a symmetric grid for each channel."""
        if self.weights == "gptq":
            return _SearchedGPTQ(bits=self.bits, group_size=None, symmetric=True)(weight, inputs)
        scale, zero = searched_grid(weight, self.bits)
        codes = quantize(weight, scale, zero, self.bits)
        shape = (weight.shape[0], weight.shape[1])
        return QuantizedWeight(
            codes, scale, None, bits=self.bits, granularity="channel", shape=shape, dtype=weight.dtype
        )


@torch.no_grad()
def rotated(model: M, seed: int = 0) -> tuple[M, list[str]]:
    r"""Stages 1a to 1c: a copy that computes what the model does, with $x Q$ for the stream x, and without outliers.

    $Q = \operatorname{diag}(\epsilon) H$ with random signs. The output layers of attention and feed-forward turn what they read.

    Args:
        model: one that `anatomy` knows; left unchanged.
        seed: of the signs.

    Returns:
        The copy, in evaluation mode, and the names of the linear layers in its blocks.
    """
    turned = copy.deepcopy(model).eval()
    parts = fold_norms_(turned)
    width = weight_of(turned.get_submodule(parts.blocks[0].up)).shape[1]  # type: ignore[arg-type]
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    rotate_stream_(turned, parts, turn(torch.diag(signs)))
    for block in parts.blocks:
        _turn_values_(turned, block)
        output: Any = turned.get_submodule(block.o)
        merged = _turn_heads(weight_of(output).double(), block.head_dim)
        turned.set_submodule(block.o, RotatedLinear(merged, output, block.n_heads))
        down: Any = turned.get_submodule(block.down)
        matrix = weight_of(down).double()
        turned.set_submodule(block.down, RotatedLinear(matrix, down, matrix.shape[1]))
    return turned, [name for block in parts.blocks for name in block.linear]


def searched_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    r"""Of the steps $s = p \max|w| / (2^{bits-1} - 1)$, p from 1 down to 0.21 by 0.01, that of the least $\sum |w - \hat w|^{2.4}$.

    Levels are $-2^{bits-1}$ to $2^{bits-1} - 1$ steps.

    Args:
        groups: `[groups, size]`.
        bits: 2 to 8.

    Returns:
        scale `[groups]`, float16, and zero point `[groups]`, float32, as `affine_grid` gives them.

    Examples:
        >>> searched_grid(torch.tensor([[7.0, -3.0, 1.0], [-7.0, 2.0, 0.0]]), 4)
        (tensor([1., 1.], dtype=torch.float16), tensor([8., 8.]))
    """
    stretch = (2**bits - 1) / (
        2**bits - 2
    )  # `affine_grid` has the largest magnitude half a step above the highest level

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_grid(stretch * low, stretch * high, bits, symmetric=True, scale_dtype=torch.float16)

    return grid(*best_range(groups, lambda low, high: nearest(groups, *grid(low, high), bits), norm=NORM, least=21))


class RotatedLinear(nn.Module):
    """A linear layer that turns what it reads: across heads, or all channels; the inverse is in its weight.

    Args:
        weight: `[out, in]`, of inputs that are not turned.
        layer: the one whose place it takes: bias, dtype.
        over: parts of the input that are turned into each other, see `hadamard.turn_across`.
    """

    def __init__(self, weight: Tensor, layer: nn.Linear, over: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(turn_across(weight, over).to(layer.weight.dtype))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.over = over

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return F.linear(turn_across(inputs, self.over), self.weight, self.bias)


class RotatedWeight(CompressedWeight):
    """A quantized weight whose inputs are turned, then quantized by token.

    Args:
        stored: the weight, of turned inputs.
        over: as in `RotatedLinear`; 1 turns nothing.
        clip: of the inputs' grids.
    """

    def __init__(self, stored: QuantizedWeight, over: int, clip: float) -> None:
        super().__init__()
        self.stored, self.over, self.clip = stored, over, clip
        self.activation_bits: int | None = None

    def dense(self) -> Tensor:
        """What turned inputs are multiplied by."""
        return self.stored.dense()

    def read(self, inputs: Tensor) -> Tensor:
        """Turned, and rounded to each token's grid."""
        turned = turn_across(inputs, self.over)
        if self.activation_bits is None:
            return turned
        codes, scale = Activations(bits=self.activation_bits, clip=self.clip).quantize(turned)
        return codes.mul_(scale).to(inputs.dtype)


def _turn_heads(x: Tensor, head_dim: int) -> Tensor:
    """Turn each head's channels, of `[..., heads * head_dim]`."""
    return turn(torch.unflatten(x, -1, (-1, head_dim))).flatten(-2)


def _turn_values_(model: nn.Module, block: BlockParts) -> None:
    """Turn what makes the values, in place; a fused layer makes them last."""
    layer: Any = model.get_submodule(block.v)
    made = block.n_kv_heads * block.head_dim
    rows = weight_of(layer)[-made:]  # a view
    rows.copy_(_turn_heads(rows.T.double(), block.head_dim).T)
    if layer.bias is not None:
        layer.bias[-made:] = _turn_heads(layer.bias[-made:].double(), block.head_dim).to(layer.bias.dtype)


class _SearchedGPTQ(GPTQ):
    """GPTQ on the grids of `searched_grid`."""

    def _grid(self, group: Tensor) -> tuple[Tensor, Tensor]:
        return searched_grid(group.T, self.bits)
