r"""What the layers of one forward share: positions, rotation, cache, and who sees whom."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from refimpl.model.cache import Cache


@dataclass
class Step:
    """What the layers of one forward share.

    Attributes:
        start: tokens before these.
        positions: `[batch or 1, time]` of these tokens.
        cos: for `rotate`.
        sin: for `rotate`.
        cache: where keys and values go.
        padding: `[batch]`, as in `Decoder.forward`.
        score_bias: that of the decoder.
    """

    start: int
    positions: Tensor
    cos: Tensor
    sin: Tensor
    cache: Cache | None
    padding: Tensor | None
    score_bias: "ScoreBias | None"
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, kept: int, positions: Tensor | None, window: int | None) -> tuple[Tensor | None, bool]:
        """Who sees whom, as `AttentionFunction` takes it.

        Args:
            kept: number of keys.
            positions: theirs, as `Cache.update` returns them.
            window: of the layer.

        Returns:
            Mask, and whether attention is causal; no mask where that says it all.
        """
        if positions is not None:
            return self._build(positions, window), False
        time = self.positions.shape[1]
        if self.padding is None and self.score_bias is None and (window is None or kept <= window):
            if time == 1:
                return None, False
            if time == kept:
                return None, True
        if (kept, window) not in self._masks:  # layers with the same window share it
            end = self.start + time
            keys = positions_of(end - kept, end, self.padding, self.positions.device)
            self._masks[kept, window] = self._build(keys, window)
        return self._masks[kept, window], False

    def _build(self, keys: Tensor, window: int | None) -> Tensor:
        """`[batch or 1, 1 or heads, time, kept]` from positions as `Cache.update` returns them."""
        k = keys[:, None] if keys.ndim == 2 else keys
        k = k[:, :, None] if k.ndim == 3 else k  # [b, 1 or heads, 1 or time, kept]
        q = self.positions[:, None, :, None]
        visible = (k <= q) & ((k >= 0) | (k == q))  # padding sees itself: a row without a key would be NaN
        if window is not None:
            visible &= q - k < window
        if self.score_bias is None:
            return visible
        bias = self.score_bias(q, k).to(self.cos.dtype)
        if 1 < visible.shape[1] < bias.shape[1]:
            visible = visible.repeat_interleave(bias.shape[1] // visible.shape[1], dim=1)
        return bias.masked_fill(~visible, float("-inf"))


class ScoreBias(Protocol):
    """What `Decoder.score_bias` may be: ALiBi and other relative positions that are added to scores."""

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """From positions `[batch or 1, 1, time, 1]` and `[batch or 1, 1 or kv_heads, 1, kept]`: `[..., heads, time, kept]`."""
        ...


def positions_of(start: int, end: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Positions of tokens start:end, `[batch or 1, time]`, where rows have `padding` `[batch]` before their first.

    Examples:
        >>> positions_of(0, 3, torch.tensor([0, 2]), torch.device("cpu")).tolist()
        [[0, 1, 2], [-2, -1, 0]]
    """
    positions = torch.arange(start, end, device=device).unsqueeze(0)
    return positions if padding is None else positions - padding.to(device).unsqueeze(1)
