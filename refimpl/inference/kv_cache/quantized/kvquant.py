r"""KVQuant: keys per channel and before their rotation, values per token, levels that are fitted to the model, outliers apart.

Source: `kvquant` (arXiv 2401.18079), the sections on per-channel keys, keys before the rotary embedding, non-uniform datatypes (nuq),
per-vector dense-and-sparse quantization, and attention-sink-aware quantization, Q-Norm; official code
SqueezeAILab/KVQuant@57a238357f0ffe50084670fcd5781c9848f80ea2, quant/kvquant/simquant_module_quantizer.py for calibration and quantizers,
gradients/run-fisher.py for the weights, deployment/transformers/src/transformers/models/llama/modeling_llama.py (`QuantK`, `QuantV`) for
what is held: at most half the share of outliers at either end of a token's keys, exactly that many of its values.

Differs from the paper: the decoder hands over rotated keys; they are turned back by the inverse of the very rotation that turned them,
which costs a rounding of the model's dtype. k-means starts at quantiles and at equal distances, and repeats exactly; the official code
draws its start. The first tokens of a calibration text count neither for levels nor, as they do there, for ranges. Q-Norm is applied at 2
bits only. Of n numbers $\lceil n s / 2 \rceil$ at either end may be outliers (one more there, where 2 divides ns), held as differences to
what the codes give, in 16 bits; channels' ranges are held in float32 (16 bits there). A channel that never moved in calibration keeps its
value (0/0 there). Without calibration, which the paper does not know, the levels are
NormalFloat's and the channels' ranges are those of the text's own first tokens, which are held as they are until then.

Not here: kernels that look levels up and rotate inside the product. Keys and values are expanded, and keys rotated, for as long as a layer
attends. Rotations that depend on the length of the text (dynamic NTK) are refused. The bytes of levels and of channels' ranges count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.quantized.groups import halved
from refimpl.inference.kv_cache.quantized.leveled import LeveledVectors
from refimpl.inference.kv_cache.quantized.levels import Levels, fitted_levels, normal_levels, normalized_levels
from refimpl.inference.kv_cache.quantized.outliers import stored
from refimpl.inference.kv_cache.quantized.sensitivity import sensitivities
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.model.rope import Rotary, rotate

TINY = 1e-12  # half the width of a channel that never moved


class Grid(NamedTuple):
    """Of one layer: the channels' ranges `[1 or rows, 1, 1, kv_heads * head_dim]`, as half a width and a middle; levels of keys and of values."""

    width: Tensor
    middle: Tensor
    keys: Levels
    values: Levels


@dataclass(frozen=True, kw_only=True)
class KVQuant:
    """The cache in `bits` bits a number; every token is quantized as soon as it has been attended to.

    Args:
        bits: 2 to 8; the paper's are 2, 3 and 4.
        outliers: share of each token's keys and of its values, over all heads, that is kept apart; 0 is dense only.
        sinks: first tokens that are kept as they are; the paper keeps one.
        warmup: tokens after these to measure the keys' channels on, where there is no calibration.
        calibration: each layer's grid, as `calibrated` makes it.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=40)
        >>> cache, x = KVQuant(warmup=99).cache(config), torch.randn(1, 1, 100, 64)
        >>> k, v, _ = cache.update(0, x, x, x, torch.arange(100)[None])
        >>> tokens = 99 * (2 * 64 * 4 // 8 + 2 * 2 * (2 + 1) + 4)  # codes; two outliers each, 16 bits at a place of 8; a value's range
        >>> cache.nbytes - tokens == 2 * 64 * 4 + 2 * 64 * 4 + 16 * 4 + 32 * 4  # the sink, ranges of channels, levels, frequencies
        True
    """

    bits: int = 4
    outliers: float = 0.01
    sinks: int = 1
    warmup: int = 64
    calibration: tuple[Grid, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 2 to 8; the paper uses 2 to 4")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers={self.outliers} must be a share from 0 to below 0.5; the paper uses 0.01")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0; the paper keeps 1")
        if self.warmup < 2:
            raise ValueError(f"warmup={self.warmup} must be at least 2 tokens, for a range")

    def calibrated(self, model: Decoder, texts: Sequence[Tensor]) -> "KVQuant":
        """The method with ranges and levels that are fitted to a model, offline.

        Args:
            model: left as it is, gradients too.
            texts: each `[time]` tokens; the paper takes 16 of 2,048.

        Raises:
            ValueError: texts that are too short or none, or gradients that are not finite.
        """
        grids = []
        for layer in sensitivities(model, texts, skip=self.sinks):
            width, middle = span(layer.keys, self.outliers, dim=0)
            keys = self._levels((layer.keys - middle) / width, layer.key_weights)
            own_width, own_middle = span(layer.values, self.outliers, dim=1)
            values = self._levels((layer.values - own_middle) / own_width, layer.value_weights)
            grids.append(Grid(width[None, None], middle[None, None], keys, values))
        return replace(self, calibration=tuple(grids))

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache; a sliding-window layer's too holds all of its past.

        Raises:
            ValueError: a calibration for another model, or frequencies that depend on the length (dynamic NTK).
        """
        if config.rope.type == "dynamic":
            raise ValueError(
                "rope type='dynamic' turns keys by the length of the text: they can't be turned back later; use 'yarn'"
            )
        if self.calibration is not None:
            found = len(self.calibration), self.calibration[0].width.shape[-1]
            if found != (config.n_layers, config.n_kv_heads * config.head_dim):
                raise ValueError(
                    f"calibration of {found[0]} layers with {found[1]} channels of keys is not this model's, which has "
                    f"{config.n_layers} with {config.n_kv_heads * config.head_dim}: call calibrated(model, texts)"
                )
        rotary, levels = Rotary(config), normal_levels(self.bits)
        start = Levels(levels, levels)
        grids = self.calibration
        return LayeredCache(lambda layer: _Layer(self, rotary, start, None if grids is None else grids[layer]))

    def _levels(self, x: Tensor, weights: Tensor) -> Levels:
        """Fitted to what of x is no outlier."""
        inside = x.abs() <= 1
        levels = fitted_levels(x[inside], weights[inside], self.bits)
        return Levels(levels, normalized_levels(levels, x[inside]) if self.bits == 2 else levels)


class _Layer:
    """Sinks as they came; codes and ranges; and what waits for the channels' ranges to be measured.

    A token's vector `[rows, 1, tokens, kv_heads * head_dim]` has its heads side by side, and its keys not rotated.
    """

    def __init__(self, method: KVQuant, rotary: Rotary, levels: Levels, grid: Grid | None) -> None:
        self.method, self.rotary = method, rotary
        own = (levels, levels) if grid is None else (grid.keys, grid.values)
        self.keys, self.values = (LeveledVectors(method.bits, x) for x in own)
        self.channels = None if grid is None else (grid.width, grid.middle)  # of keys
        self.width, self.middle = Tokens(), Tokens()  # of each token's values
        self.first: list[Tensor] = []  # keys, values
        self.recent: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, None]:  # noqa: ARG002 - the protocol's
        """Everything before, expanded, and the new tokens as they are; these are quantized for the next call."""
        if self.channels is not None:
            self.channels = (self.channels[0].to(k.device), self.channels[1].to(k.device))
        every = self._all(k, v) if self.first else [k, v]
        sinks = self.method.sinks
        if not self.first or self.first[0].shape[2] < sinks:
            self.first = [x[:, :, :sinks].clone(memory_format=torch.contiguous_format) for x in every]
        begin = self.first[0].shape[2] + self.keys.length
        rest = [x[:, :, begin:] for x in every]
        if self.channels is None and rest[0].shape[2] >= self.method.warmup:
            seen = self._turned_back(rest[0][:, :, : self.method.warmup], begin)
            self.channels = span(seen, self.method.outliers, dim=2)
        if self.channels is not None and rest[0].shape[2]:
            self._append_keys(self._turned_back(rest[0], begin), *self.channels, halved(k.dtype))
            self._append_values(side_by_side(rest[1]), halved(v.dtype))
            rest = [x[:, :, :0] for x in rest]
        self.recent = [x.clone(memory_format=torch.contiguous_format) for x in rest]
        return every[0], every[1], None

    def compress_prefill(self) -> None:
        """Nothing: `update` has quantized the prompt already."""

    def _all(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """All keys and values: sinks, those held in codes, those that wait, new ones."""
        parts = [[first, recent, new] for first, recent, new in zip(self.first, self.recent, (k, v), strict=True)]
        if self.keys.length:
            assert self.channels is not None
            wide, size = torch.promote_types(k.dtype, torch.float32), k.shape[1] * k.shape[3]
            keys = self.keys.dense(size, *(x.to(wide) for x in self.channels))
            values = self.values.dense(size, self.width.all().to(wide), self.middle.all().to(wide))
            keys, values = (torch.unflatten(x.squeeze(1), -1, (k.shape[1], -1)).transpose(1, 2) for x in (keys, values))
            keys = rotate(keys, *self._rotation(self.first[0].shape[2], keys.shape[2], k))
            parts[0].insert(1, keys.to(k.dtype))
            parts[1].insert(1, values.to(v.dtype))
        return [torch.cat(x, dim=2) for x in parts]

    def _append_keys(self, x: Tensor, width: Tensor, middle: Tensor, half: torch.dtype) -> None:
        """Outliers are those beyond their channel's range, and of these the farthest at either end of the token."""
        stored(x, half)
        width, middle = width.to(x.dtype), middle.to(x.dtype)
        shares, count = (x - middle) / width, self._count(x)
        places = torch.cat([shares.topk(count, largest=largest).indices for largest in (True, False)], dim=-1)
        self.keys.append(x, width, middle, places, shares.gather(-1, places).abs() > 1, half)

    def _append_values(self, x: Tensor, half: torch.dtype) -> None:
        """Outliers are so many at either end of the token, and the range is that of the others."""
        ends = [x.topk(self._count(x) + 1, largest=largest) for largest in (True, False)]
        places = torch.cat([end.indices[..., :-1] for end in ends], dim=-1)
        high, low = (end.values[..., -1:] for end in ends)
        width = stored((high - low) / 2, half).clamp(min=torch.finfo(half).tiny)
        middle = stored((high + low) / 2, half)
        self.width.append(width)
        self.middle.append(middle)
        apart = torch.ones_like(places, dtype=torch.bool)
        self.values.append(x, width.to(x.dtype), middle.to(x.dtype), places, apart, half)

    def _count(self, x: Tensor) -> int:
        """Outliers at either end of a vector."""
        return min(math.ceil(x.shape[-1] * self.method.outliers / 2 - 1e-9), (x.shape[-1] - 1) // 2)

    def _rotation(self, begin: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `count` positions from `begin` on, rounded as the decoder of this dtype rounds them; float32 or above."""
        cos, sin = self.rotary(torch.arange(begin, begin + count, device=like.device)[None], like.dtype)
        wide = torch.promote_types(like.dtype, torch.float32)
        return cos.to(wide), sin.to(wide)

    def _turned_back(self, k: Tensor, begin: int) -> Tensor:
        r"""Vectors of rotated keys: $R^{-1} k = R^\top k / (\cos^2 + \sin^2)$, whatever rounding or factor cosines and sines bear."""
        cos, sin = self._rotation(begin, k.shape[2], k)
        return side_by_side(rotate(k.to(cos.dtype), cos, -sin) / (cos.square() + sin.square()))


def side_by_side(x: Tensor) -> Tensor:
    """`[rows, heads, tokens, head_dim]` to `[rows, 1, tokens, heads * head_dim]`, float32 or above.

    Examples:
        >>> side_by_side(torch.arange(4).view(1, 2, 2, 1)).tolist()
        [[[[0.0, 2.0], [1.0, 3.0]]]]
    """
    return x.transpose(1, 2).flatten(2).unsqueeze(1).to(torch.promote_types(x.dtype, torch.float32))


def span(x: Tensor, outliers: float, dim: int) -> tuple[Tensor, Tensor]:
    """Half the width and the middle of where x lies along a dimension, 1 along it, but for half the share of outliers at either end.

    Examples:
        >>> [float(y) for y in span(torch.tensor([0.0, 10, 20, 30, 90]), 0.5, dim=0)]  # between the quartiles, 10 and 30
        [10.0, 20.0]
    """
    ordered, last = x.sort(dim=dim).values, x.shape[dim] - 1
    ends = []
    for share in (outliers / 2, 1 - outliers / 2):
        place = int(share * last)
        below, above = (ordered.narrow(dim, min(place + i, last), 1) for i in (0, 1))
        ends.append(below.lerp(above, share * last - place))
    return ((ends[1] - ends[0]) / 2).clamp(min=TINY), (ends[1] + ends[0]) / 2
