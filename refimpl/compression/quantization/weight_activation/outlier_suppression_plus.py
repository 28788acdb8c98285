r"""Outlier Suppression+: centre each channel of activations, scale down those beyond a threshold, then quantize weights and activations.

Source: `outlier-suppression-plus` (arXiv 2304.09145), the sections on channel-wise shifting and scaling, on their migration into
neighbouring layers, and on effective values for both; official code
ModelTC/Outlier_Suppression_Plus@3ba97ae2dab0e6e5ead5da1795f50fd47025a49d, quant_transformer/quantization/migration.py and
migration_llama.py for the search, model/quant_opt.py and quant_llama.py for what is moved where, exp/opt/int6.yaml for the
defaults, exp/llama/int6_token.yaml for grids found token by token.

As in the official code, what has no bias to take a shift is scaled only (RMSNorm, and the inside of a gated feed-forward), with
thresholds down to 0.1 instead of 1; feed-forwards without a gate keep their inside as it is. The search sees the first batch.

Differs from the paper: the inputs of attention's own products are not quantized; the official code does so in its configurations
for tokens and groups only. Ranges that are fixed are means over all batches, each counted once; the official code counts the
first twice. Every position counts; the official code leaves those of padding out of the search's error and of fixed ranges.

Not here: integer kernels; models that normalize after each addition (BERT), where the shift stays in the residual path; scales for
groups of channels; token-wise clipping.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, Feed, anatomy, feeds, rescale_
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.blocks import find_blocks
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import CompressedLinear, M, check_layer
from refimpl.compression.quantization.activations import Activations, IntegerWeight
from refimpl.compression.quantization.affine import affine_grid, dequantize, from_groups, quantize, to_groups
from refimpl.compression.quantization.static_ranges import average_ranges_
from refimpl.compression.reruns import Output, Rerun
from refimpl.compression.shift import is_shiftable, shift_
from refimpl.model.bits import pack, unpack
from refimpl.model.linear import linear_at, weight_of

LEAST, LEAST_UNSHIFTED, STRIDE = 1.0, 0.1, 0.5  # the official code's smallest thresholds, and how far apart they may be


@dataclass(frozen=True, kw_only=True)
class OutlierSuppressionPlus:
    """Shifting and scaling of what norms feed to linear layers, then weights and activations of few bits in all of them.

    Args:
        bits: of weights and activations, 2 to 8.
        scope: what shares a grid of the activations: all calls, whose grid is fixed from the calibration data (`static`), or
            a token (`token`).
        symmetric: grids are centred on 0, as the official code has them at 8 bits.
        granularity: what shares a grid of the weights: an output channel, or the whole weight, as the official code has it at
            8 bits.
        steps: thresholds that are tried at least, after the largest; more where they would be more than 0.5 apart.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = OutlierSuppressionPlus(bits=4, steps=5)(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # 32 x 32 half bytes, 32 scales and zero points, a grid for inputs
        664
    """

    bits: int = 6
    scope: Literal["static", "token"] = "static"
    symmetric: bool = False
    granularity: Literal["channel", "tensor"] = "channel"
    steps: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 2 to 8; the paper uses 8, 6 and 4")
        if self.scope not in ("static", "token"):
            raise ValueError(f"scope={self.scope!r} must be 'static' or 'token'")
        if self.granularity not in ("channel", "tensor"):
            raise ValueError(f"granularity={self.granularity!r} must be 'channel' or 'tensor'")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; the official code takes 100")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A shifted, scaled and quantized copy, in evaluation mode.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with.

        Raises:
            ValueError: the layout is unknown; there is no calibration data, the model can't take it, or it makes NaN.
        """
        batches = batches_of(calibration, "OutlierSuppressionPlus needs texts to see the activations' ranges")
        small = copy.deepcopy(model).eval()
        parts = anatomy(small).blocks
        for part in parts:
            for layer in part.linear:
                check_layer(weight_of(small.get_submodule(layer)))  # type: ignore[arg-type]
        name, blocks = find_blocks(small)
        stream: Tensor | None = None
        for part, block, given in zip(parts, blocks, block_inputs(small, name, batches[:1]), strict=True):
            x, _, args, kwargs = given[0]
            stream = x if stream is None else stream
            rerun = Rerun(block, stream, args, kwargs)
            for feed, consumers, target in stages(small, part):
                self._migrate(small, feed, consumers, target, rerun)
            stream = rerun()
        if self.scope == "static":
            average_ranges_(small, batches)
        return small

    def _migrate(
        self, model: nn.Module, feed: Feed | None, consumers: list[str], target: str | None, rerun: Rerun
    ) -> None:
        """Shift and scale what some layers read, if there is a feed, and quantize these layers, in place."""
        around = model.get_submodule(consumers[0].rpartition(".")[0])
        x, args, kwargs = rerun.seen_by(model.get_submodule(consumers[0]), around)
        if not torch.isfinite(x).all():
            raise ValueError(f"the calibration data makes NaN or infinity in the inputs of layer {consumers[0]!r}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if feed is not None:
            shifted = is_shiftable(model, feed)
            if shifted:
                x = x - shift_(model, feed, self.shift(x.flatten(0, -2)))
            output = Output(model, consumers, target, args, kwargs)
            scale = self.scale(x, output, LEAST if shifted else LEAST_UNSHIFTED)
            divide_(model, feed, scale)
            x = x / scale
        self.quantize_(model, consumers, x)

    def quantize_(self, model: nn.Module, layers: list[str], x: Tensor) -> None:
        """Put quantized layers in the place of those that read x, `[..., in]`, whose range fixes their grid at first."""
        for name in layers:
            layer = linear_at(model, name)
            model.set_submodule(name, CompressedLinear(self._held(weight_of(layer), x), layer.bias))

    def shift(self, inputs: Tensor) -> Tensor:
        r"""Centre of each channel, $z_j = (\max X_j + \min X_j) / 2$, `[in]`, of inputs `[n, in]`."""
        low, high = inputs.aminmax(dim=0)
        return (low + high) / 2

    def scale(self, x: Tensor, output: Output, least: float) -> Tensor:
        r"""Factors $s$ of the threshold that moves the output least, $\min_t \|Q(X / s)\, Q(W s)^\top - X W^\top\|^2$.

        Thresholds fall evenly from the largest magnitude, where all factors are 1, to `least`.

        Args:
            x: `[..., in]`, shifted.
            output: what is made of inputs and weights.
            least: of the thresholds.

        Returns:
            `[in]`, 1 or more.
        """
        low, high = x.flatten(0, -2).aminmax(dim=0)
        exact, largest = output(x, output.weight), float(x.abs().max())
        steps = max(self.steps, int(float(x.max().clamp(min=0)) / STRIDE))
        best, least_error = torch.ones_like(low), float("inf")
        for i in range(steps + 1 if largest >= least else 0):
            t = largest + (least - largest) * i / steps
            scale = threshold_scales(low, high, t)
            moved = output(self._read(x / scale, t), self._rounded(output.weight * scale))
            error = float((moved - exact).square().sum())
            if error < least_error:
                best, least_error = scale, error
        return best

    def _read(self, x: Tensor, t: float) -> Tensor:
        """Quantized inputs as the product sees them, on a fixed grid from -t to t or on those of their tokens."""
        activations = self._activations
        grid = activations.grid(torch.tensor(-t), torch.tensor(t)) if self.scope == "static" else None
        codes, scale = activations.quantize(x, grid)
        return (codes * scale).to(x.dtype)

    def _rounded(self, weight: Tensor) -> Tensor:
        groups, scale, zero = self._grids(weight)
        rounded = dequantize(quantize(groups, scale, zero, self.bits), scale, zero)
        return from_groups(rounded, (weight.shape[0], weight.shape[1])).to(weight.dtype)

    def _held(self, weight: Tensor, x: Tensor) -> IntegerWeight:
        groups, scale, zero = self._grids(weight)
        return IntegerWeight(
            quantize(groups, scale, zero, self.bits),
            scale,
            None if self.symmetric else zero,
            bits=self.bits,
            granularity=self.granularity,
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
            activations=self._activations,
            reach=(x.min(), x.max()) if self.scope == "static" else None,
        )

    def _grids(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of a weight, and their scales and zero points."""
        groups = to_groups(weight, self.granularity, weight.shape[1])
        low, high = groups.aminmax(dim=1)
        if self.symmetric:  # the official code leaves out the lowest level
            scale = self._activations.grid(low, high)[0]
            return groups, scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return groups, *affine_grid(low, high, self.bits, symmetric=False, scale_dtype=torch.float32)

    @property
    def _activations(self) -> Activations:
        return Activations(bits=self.bits, scope=self.scope, symmetric=self.symmetric)


def threshold_scales(low: Tensor, high: Tensor, t: float) -> Tensor:
    r"""Factor of each channel, $s_j = \max(1, \max|X_j| / t)$, from its least and greatest value.

    Examples:
        >>> threshold_scales(torch.tensor([-1.0, -6.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]), 2.0).tolist()
        [1.0, 3.0, 1.5]
    """
    return (torch.maximum(-low, high) / t).clamp(min=1)


@torch.no_grad()
def divide_(model: nn.Module, feed: Feed, scale: Tensor) -> None:
    """`rescale_`, also where the feed's producer is a linear layer that is quantized: its rows get smaller steps, its codes stay."""
    layer = model.get_submodule(feed.producer)
    if not isinstance(layer, CompressedLinear):
        rescale_(model, feed, scale)
        return
    held: Any = layer.compressed
    rows, held.group_size = held.shape
    if held.zero is not None:
        held.zero = pack(unpack(held.zero, held.bits, held.scale.numel()).expand(rows).contiguous(), held.bits)
    held.scale, held.granularity = held.scale / scale, "channel"
    if layer.bias is not None:
        layer.bias.div_(scale)
    for name in feed.consumers:
        weight_of(model.get_submodule(name)).mul_(scale)  # type: ignore[arg-type]


def stages(model: nn.Module, part: BlockParts) -> list[tuple[Feed | None, list[str], str | None]]:
    """What is quantized one after the other in a block: the feed that is moved, the layers that read it, and the layer whose
    input the error is taken of; None where nothing is moved, or where it is that of the layers' own output.
    """
    found = {feed.producer: feed for feed in feeds(model, part)}
    gated = part.gate is not None
    inner = [name for name in (part.gate, part.up) if name is not None]
    return [
        (found[part.attention_norm], list(dict.fromkeys((part.q, part.k, part.v))), part.o),
        (None, [part.o], None),
        (found[part.feed_forward_norm], inner, part.down if gated else None),
        (found[part.up] if gated else None, [part.down], None),
    ]
