r"""SmoothQuant: divide the channels of activations, multiply the weights that read them, then quantize both to 8 bits.

Source: `smoothquant` (arXiv 2211.10438), Eq. (3) and (4), Section 4, Table 2 for the levels; official code
mit-han-lab/smoothquant@c61476d728e42ae0d8a35e7e78494edcac3237b5, smoothquant/smooth.py, calibration.py and fake_quant.py.

Differs from the paper: a channel that is zero in the calibration data, or that no weight reads, keeps $s_j = 1$ (the official
code raises the weights' maximum and the factor to at least 1e-5). The inputs of attention's own products are not quantized, as in the official code for Llama; the
paper has them in 8 bits. A static range is derived from the channels' maxima of one run, instead of from a second run
of the smoothed model: division by $s_j$ is all that happens to them.

Not here: integer kernels; Bloom, Falcon and mixtures of experts; the search for alpha.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import Anatomy, anatomy, feeds, rescale_
from refimpl.compression.calibration import batches_of, call
from refimpl.compression.protocol import CompressedLinear, M, check_layer
from refimpl.compression.quantization.activations import Activations, Scope, integer_weight
from refimpl.model.linear import is_linear, linear_at, weight_of

Level = Literal["O1", "O2", "O3"]
SCOPES: dict[str, Scope] = {"O1": "token", "O2": "tensor", "O3": "static"}  # of the activations (Table 2)


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Smoothing of what norms feed to linear layers, then 8-bit weights and activations in all linear layers of the blocks.

    Args:
        alpha: share of the difficulty that goes to the weights, 0 (none) to 1 (all).
        level: what shares a grid of the activations: a token (O1), all tokens of a call (O2), or all calls (O3), whose grid is
            fixed from the calibration data.
        granularity: what shares a scale of the weights: the whole weight, as at all levels of the paper, or an output channel.
        bits: of weights and activations, 2 to 8.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = SmoothQuant(level="O3")(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # a byte for each of 32 x 32 weights, a scale for them, one for inputs
        1032
    """

    alpha: float = 0.5
    level: Level = "O1"
    granularity: Literal["tensor", "channel"] = "tensor"
    bits: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be 0 to 1; the paper uses 0.5")
        if self.level not in SCOPES:
            raise ValueError(f"level={self.level!r} must be 'O1', 'O2' or 'O3'")
        if self.granularity not in ("tensor", "channel"):
            raise ValueError(f"granularity={self.granularity!r} must be 'tensor' or 'channel'")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 2 to 8; the paper uses 8")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A smoothed and quantized copy, in evaluation mode.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with.

        Raises:
            ValueError: the layout is unknown; there is no calibration data, the model can't take it, or it makes NaN.
        """
        batches = batches_of(calibration, "SmoothQuant needs texts to see the activations' ranges")
        small = copy.deepcopy(model).eval()
        parts = anatomy(small)
        largest = channel_maxima(small, [name for block in parts.blocks for name in block.linear], batches)
        largest = smooth_(small, parts, largest, self.alpha)
        activations = Activations(bits=self.bits, scope=SCOPES[self.level])
        for name, maxima in largest.items():
            layer = linear_at(small, name)
            check_layer(weight_of(layer))
            reach = (-maxima.max(), maxima.max()) if self.level == "O3" else None
            held = integer_weight(
                weight_of(layer), activations, bits=self.bits, granularity=self.granularity, reach=reach
            )
            small.set_submodule(name, CompressedLinear(held, layer.bias))
        return small


def smoothing_scales(largest: Tensor, weight_largest: Tensor, alpha: float) -> Tensor:
    r"""Factor of each channel, $s_j = \max|X_j|^\alpha / \max|W_j|^{1-\alpha}$ (Eq. 4).

    Args:
        largest: `[in]`, $\max|X_j|$ over the tokens.
        weight_largest: `[in]`, $\max|W_j|$ over all outputs that read the channel.
        alpha: 0 to 1.

    Returns:
        `[in]`, float32, positive: activations are divided by it, the weights' columns multiplied. It is 1 where a maximum is 0.

    Examples:
        >>> smoothing_scales(torch.tensor([16.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 1.0]), 0.5).tolist()
        [2.0, 3.0, 1.0]
    """
    scale = largest.float().pow(alpha) / weight_largest.float().pow(1 - alpha)
    return torch.where((largest > 0) & (weight_largest > 0), scale, 1.0)


@torch.no_grad()
def smooth_(model: nn.Module, parts: Anatomy, largest: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    r"""Absorb the factors in each norm that feeds linear layers, and in these, in place; no output of the model changes.

    Args:
        model: that of the parts.
        parts: of the model.
        largest: $\max|X_j|$ of each linear layer's inputs, as `channel_maxima` gives them.
        alpha: 0 to 1.

    Returns:
        `largest` of the smoothed model.
    """
    smoothed = dict(largest)
    for block in parts.blocks:
        for feed in feeds(model, block):
            if feed.producer not in (block.attention_norm, block.feed_forward_norm):
                continue
            weights = [weight_of(layer) for layer in map(model.get_submodule, feed.consumers) if is_linear(layer)]
            weight_largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
            scale = smoothing_scales(largest[feed.consumers[0]], weight_largest, alpha)
            rescale_(model, feed, scale)
            smoothed |= {name: largest[name] / scale for name in feed.consumers}
    return smoothed


@torch.no_grad()
def channel_maxima(model: nn.Module, layers: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """Largest magnitude of each channel of the layers' inputs over all tokens, `[in]` each, float32.

    Raises:
        ValueError: the model can't take a batch; a layer is never reached, or gets NaN or infinity.
    """
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].detach().abs().flatten(0, -2).amax(dim=0).float()
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return note

    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(watch(name)))
        for i, batch in enumerate(batches):
            call(model, batch, i)
    for name in layers:
        if name not in largest:
            raise ValueError(f"the calibration data never reaches layer {name!r}")
        if not torch.isfinite(largest[name]).all():
            raise ValueError(f"the calibration data makes NaN or infinity in the inputs of layer {name!r}")
    return {name: largest[name] for name in layers}
