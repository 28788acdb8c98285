r"""Shifts and scales of a block's channels that are learned, undone where the channels are read: no output changes before rounding.

Source: `omniquant` (arXiv 2308.13137), Section 3.3, learnable equivalent transformation, Eq. (3) to (5); official code
OpenGVLab/OmniQuant@95fae1bd00eaa60d03a20eb39c76c4cb173f51f7, models/transformation.py and quantize/omniquant.py.

Differs from the paper: the two channels that rotary positions turn into each other share their factor between queries and keys, as
do the queries of a group; the official code gives each its own, which changes what the model computes. Where queries and keys are
normalized after their layers there is no such factor. Scales begin with all layers that read a channel, there with the first of
them; shifts with the centres of whole ranges, there with a moving average.

Not here: the inside of a feed-forward, which the official code leaves too.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, Feed, feeds
from refimpl.compression.ranges import Range
from refimpl.compression.shift import is_shiftable
from refimpl.model.linear import linear_at, weight_of

LEAST = 1e-2  # of the scales, in the official code


class LearnedTransform(nn.Module):
    r"""The factors of one block: $s$ and $\delta$ for what its norms make and for its values, $s_a$ between queries and keys.

    Args:
        model: a decoder.
        part: one of its blocks.
        ranges: of the channels that reach the first of the layers that read a norm, and the layer `o`.
        scales: scales to begin with, from the largest magnitudes of channels and of the weights that read them.
        shifts: whether channels are shifted, where the norm before has a bias.
        heads: whether queries and keys are scaled against each other.

    Examples:
        >>> from refimpl.compression.anatomy import anatomy
        >>> from refimpl.compression.ranges import channel_ranges
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder
        >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6))
        >>> part = anatomy(model).blocks[0]
        >>> ranges = channel_ranges(model, [part.q, part.o, part.gate], [torch.arange(5)[None]])
        >>> transform = LearnedTransform(model, part, ranges, lambda inputs, weights: (inputs / weights).sqrt())
        >>> [len(scale) for scale in transform.scales], list(transform.heads.shape)  # norm, values, norm; a head's pairs of channels
        ([8, 4, 8], [1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        part: BlockParts,
        ranges: Mapping[str, Range],
        scales: Callable[[Tensor, Tensor], Tensor],
        *,
        shifts: bool = True,
        heads: bool = True,
    ) -> None:
        super().__init__()
        self.part = part
        self.feeds = [feed for feed in feeds(model, part) if feed.producer != part.up]
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        self.shifted = shifted = shifts and is_shiftable(model, self.feeds[0])
        for feed in self.feeds:
            low, high = ranges[feed.consumers[0]]
            low, high = _by_channel(low, feed, "amin"), _by_channel(high, feed, "amax")
            columns = torch.stack([_weight(model, name).abs().amax(dim=0) for name in feed.consumers]).amax(dim=0)
            scale = scales(torch.maximum(-low, high), _by_channel(columns, feed, "amax"))
            self.scales.append(nn.Parameter(scale.clamp(min=LEAST)))
            shift = (low + high) / 2 if shifted else torch.zeros_like(low)
            self.shifts.append(nn.Parameter(shift, requires_grad=shifted))
        attention = model.get_submodule(part.o.rpartition(".")[0])
        rotary, normalized = part.gate is not None, getattr(attention, "q_norm", None) is not None
        size = part.head_dim // (
            2 if rotary else 1
        )  # layouts with a gate turn channels i and i + head_dim / 2 into each other
        self.heads = nn.Parameter(torch.ones(part.n_kv_heads, size), requires_grad=heads and not normalized)

    def forward(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""A block's tensors after the transformation, with gradients to its factors.

        Args:
            held: by the name of a module in the model and `.weight` or `.bias`: of norms, and of linear layers as `[out, in]`;
                biases that a shift needs are there.
        """
        made = dict(held)
        for feed, scale, shift in zip(self.feeds, self.scales, self.shifts, strict=True):
            weight, bias, source = f"{feed.producer}.weight", f"{feed.producer}.bias", feed.source.to(scale.device)
            used, column = _used(source)
            channels = len(made[weight])
            if bias in made:
                made[bias] = made[bias] - shift.new_zeros(channels).index_copy(0, used, shift)
            _multiply_(made, feed.producer, scale.new_ones(channels).index_copy(0, used, 1 / scale))
            for name in feed.consumers:
                if shift.requires_grad:
                    made[f"{name}.bias"] = made[f"{name}.bias"] + made[f"{name}.weight"] @ shift[column]
                made[f"{name}.weight"] = made[f"{name}.weight"] * scale[column]
        for name, factor in self._between_heads():
            _multiply_(made, name, factor)
        return made

    def _between_heads(self) -> list[tuple[str, Tensor]]:
        """What the rows of the layers of queries and keys are multiplied by."""
        part = self.part
        factor = self.heads.repeat(1, part.head_dim // self.heads.shape[1])  # [kv heads, head_dim]
        queries = 1 / factor.repeat_interleave(part.n_heads // part.n_kv_heads, dim=0).flatten()
        if part.q == part.k:
            values = torch.ones(part.n_kv_heads * part.head_dim, device=factor.device)
            return [(part.q, torch.cat([queries, factor.flatten(), values]))]
        return [(part.q, queries), (part.k, factor.flatten())]

    @torch.no_grad()
    def keep_positive_(self) -> None:
        """Raise scales below the least to it."""
        for scale in (*self.scales, self.heads):
            scale.clamp_(min=LEAST)


def _multiply_(made: dict[str, Tensor], name: str, factor: Tensor) -> None:
    """Multiply what a norm or a linear layer makes, channel by channel, in the dictionary."""
    weight, bias = made[f"{name}.weight"], made.get(f"{name}.bias")
    made[f"{name}.weight"] = weight * (factor[:, None] if weight.ndim == 2 else factor)
    if bias is not None:
        made[f"{name}.bias"] = bias * factor


def _by_channel(columns: Tensor, feed: Feed, reduce: str) -> Tensor:
    """Numbers of the columns that read a feed, as numbers of the channels that are read: the least or greatest of a channel's."""
    used, column = _used(feed.source.to(columns.device))
    return columns.new_empty(len(used)).scatter_reduce(0, column, columns, reduce, include_self=False)


def _used(source: Tensor) -> tuple[Tensor, Tensor]:
    """The channels that are read, and which of them each column reads."""
    used, column = torch.unique(source, return_inverse=True)
    return used, column


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = linear_at(model, name)
    return weight_of(layer).float()
