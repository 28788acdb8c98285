r"""RPTQ: put channels of like ranges side by side, and give each such cluster of activations its own scale and zero point.

Source: `rptq` (arXiv 2304.01089), the sections on clustering and reordering of channels (`clusters`) and on avoiding explicit
reordering (`reorder`); official code hahnyuan/RPTQ4LLM@96190691f02be6b27ba24d5a73574dbf9a8336c6, main.py for the defaults,
quantize/opt_reorder_quantize.py for what is reordered, quantize/quant_transformer_layer.py for the order of things.

As in the official code, what norms make has 8 bits at least; queries, keys and values are rounded where they are made; weights are
rounded by GPTQ, on a grid for each row and cluster of columns.

Differs from the paper: the order follows from one run of the original model, and ranges are extremes over all texts, seen behind all
layers before, which are quantized already; the official code takes both behind the quantized blocks before, inside of a block from
what is not quantized yet, and moving averages for ranges. GPTQ is given quantized inputs; the official code lets them pass as they
are while it gathers ranges and Hessians in one run. Grids are those that `clusters` and `clustered` state. In layouts with rotary
positions queries and keys are clustered where they stand, and rounded before they are turned.

Not here: a cache that holds codes (it holds their values); 8-bit attention probabilities; kernels.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, anatomy
from refimpl.compression.calibration import batches_of, inputs_by_group
from refimpl.compression.protocol import CompressedLinear, M
from refimpl.compression.quantization.clustered import ClusteredWeight, ClusterRounded, clustered_gptq
from refimpl.compression.quantization.clusters import ClusterGrids, kmeans
from refimpl.compression.ranges import Range, channel_ranges
from refimpl.compression.reorder import (
    movable,
    reorder_inside_,
    reorder_norm_,
    reorder_queries_and_keys_,
    reorder_values_,
)
from refimpl.model.linear import is_linear, weight_of

NORM_BITS = 8  # at least, of what norms make


@dataclass(frozen=True, kw_only=True)
class RPTQ:
    """Reordered channels, activations quantized in clusters, and weights by GPTQ.

    Args:
        bits: of weights, 1 to 8.
        activation_bits: of activations, 2 to 8; the paper's are 8, 4 and 3.
        clusters: of the channels that norms make, and of a feed-forward's inside.
        head_clusters: of the channels of a head, in queries, keys and values.
        kv_only: quantize, of all activations, keys and values alone: the paper's W4A4KV, W4A3KV and W3A3KV.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = RPTQ(clusters=4)(model, [torch.arange(60).view(2, 30)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # half bytes, 4 x 32 scales and zeros; 2 x 32 labels, 4 scales and zeros
        992
    """

    bits: int = 4
    activation_bits: int = 4
    clusters: int = 32
    head_clusters: int = 4
    kv_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits={self.activation_bits} must be 2 to 8")
        for name in ("clusters", "head_clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, which is one grid for all channels")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A reordered and quantized copy, in evaluation mode.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with.

        Raises:
            ValueError: the layout is unknown; there is no calibration data, the model can't take it, or it makes NaN.
        """
        batches = batches_of(calibration, "RPTQ needs texts to see the channels' ranges")
        small = copy.deepcopy(model).eval()
        parts = anatomy(small).blocks
        clusters = self.reorder_(small, parts, batches)
        norm_fed = {name for part in parts for name in (part.q, part.k, part.v, part.gate, part.up)}
        layers = {name: small.get_submodule(name) for part in parts for name in part.linear}
        for names, inputs in inputs_by_group(small, layers, batches):
            low, high = inputs.float().aminmax(dim=0)
            bits = max(NORM_BITS, self.activation_bits) if names[0] in norm_fed else self.activation_bits
            grids = None if self.kv_only else ClusterGrids(clusters.read[names[0]], low, high, bits)
            seen = inputs if grids is None else grids.read(inputs)
            for name in names:
                layer = layers[name]
                assert is_linear(layer)
                stored = clustered_gptq(weight_of(layer), seen, clusters.read[name], self.bits)
                held = stored if grids is None else ClusteredWeight(stored, copy.deepcopy(grids))
                packed = CompressedLinear(held, layer.bias)
                if name in clusters.made:
                    packed = self._rounded(packed, clusters.made[name], inputs)
                small.set_submodule(name, packed)
        return small

    def _rounded(self, layer: CompressedLinear, labels: Tensor, inputs: Tensor) -> ClusterRounded:
        """A layer of queries, keys or values with its outputs rounded on grids of what it makes of its inputs."""
        low, high = layer(inputs).float()[:, -len(labels) :].aminmax(dim=0)
        return ClusterRounded(layer.compressed, layer.bias, ClusterGrids(labels, low, high, self.activation_bits))

    def reorder_(self, model: nn.Module, parts: Iterable[BlockParts], batches: list[Any]) -> "Clusters":
        """Put channels of like ranges side by side, in place; no output of the model changes.

        Args:
            model: a decoder.
            parts: its blocks.
            batches: calibration data.

        Returns:
            The clusters of the channels, in their new order.
        """
        parts = list(parts)
        made = [n for p in parts for n in dict.fromkeys((p.attention_norm, p.q, p.k, p.v, p.feed_forward_norm))]
        ranges = channel_ranges(model, [name for p in parts for name in (p.o, p.down)], batches, made=made)
        found = Clusters({}, {})
        for part in parts:
            readers = {
                part.attention_norm: list(dict.fromkeys((part.q, part.k, part.v))),
                part.feed_forward_norm: [name for name in (part.gate, part.up) if name is not None],
            }
            for norm, names in readers.items():
                index, labels = ordered(_points([ranges[norm]], 1), self.clusters)
                reorder_norm_(model, norm, names, index[0])
                found.read.update(dict.fromkeys(names, labels[0]))
            index, labels = ordered(_points([ranges[part.down]], 1), self.clusters)
            reorder_inside_(model, part, index[0])
            found.read[part.down] = labels[0]
            self._order_heads_(model, part, ranges, found)
        return found

    def _order_heads_(self, model: nn.Module, part: BlockParts, ranges: Mapping[str, Range], found: "Clusters") -> None:
        """R2 and R3: queries and keys, and values, clustered within each head."""
        heads, kv_heads, count = part.n_heads, part.n_kv_heads, self.head_clusters
        low, high = (
            extreme.view(kv_heads, -1, part.head_dim) for extreme in ranges[part.o]
        )  # [kv heads, group, head_dim]
        index, values = ordered(_points([(low.amin(1), high.amax(1))], kv_heads), count)
        reorder_values_(model, part, index)
        found.read[part.o] = _distinct(values.repeat_interleave(heads // kv_heads, dim=0))
        q, k = (_rows(ranges[name], part, i) for i, name in enumerate((part.q, part.k)))
        if movable(model, part):
            index, queries = ordered(_points([q, k], heads), count)
            reorder_queries_and_keys_(model, part, index)
            keys = queries
        else:
            queries, keys = kmeans(_points([q], heads), count), kmeans(_points([k], kv_heads), count)
        labels = [_distinct(keys), _distinct(values)] if self.kv_only else [*map(_distinct, (queries, keys, values))]
        if part.q == part.v:
            firsts = [sum(int(before.max()) + 1 for before in labels[:i]) for i in range(len(labels))]
            found.made[part.q] = torch.cat([own + first for own, first in zip(labels, firsts, strict=True)])
        else:
            found.made.update(zip((part.q, part.k, part.v)[-len(labels) :], labels, strict=True))


@dataclass(frozen=True)
class Clusters:
    """The cluster of each channel, `[channels]`: of what layers read, and of what those of queries, keys and values make."""

    read: dict[str, Tensor]
    made: dict[str, Tensor]


def ordered(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """An order in which the channels of a cluster stand side by side.

    Args:
        points: `[sets, channels, features]`.
        clusters: of each set.

    Returns:
        Where the channel of each place stood, and the cluster of each place, `[sets, channels]` both.

    Examples:
        >>> ordered(torch.tensor([[[1.0], [9.0], [1.1], [9.1]]]), 2)
        (tensor([[0, 2, 1, 3]]), tensor([[0, 0, 1, 1]]))
    """
    labels, index = kmeans(points, clusters).sort(dim=1, stable=True)
    return index, labels


def _points(ranges: Iterable[Range], heads: int) -> Tensor:
    """Channels as points, `[heads, channels of a head, features]`: their greatest and least values."""
    ranges = list(ranges)
    features = [high for _, high in ranges] + [low for low, _ in ranges]
    return torch.stack([feature.view(heads, -1) for feature in features], dim=-1)


def _rows(ranges: Range, part: BlockParts, i: int) -> Range:
    """Of what a layer makes, queries (0) or keys (1): all of it, or their share of a fused layer's."""
    if part.q != part.k:
        return ranges
    first, size = (0, part.n_heads * part.head_dim), part.n_kv_heads * part.head_dim
    start, stop = first if i == 0 else (first[1], first[1] + size)
    return ranges[0][start:stop], ranges[1][start:stop]


def _distinct(labels: Tensor) -> Tensor:
    """Clusters of several heads, numbered through: `[heads, channels]` to `[heads * channels]`."""
    first = (labels.amax(dim=1) + 1).cumsum(0).roll(1)
    first[0] = 0
    return (labels + first[:, None]).flatten()
