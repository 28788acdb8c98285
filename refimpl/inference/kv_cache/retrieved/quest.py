r"""Quest: all tokens are held, and each new one reads the pages whose keys could score highest with it.

Source: `quest` (arXiv 2406.10774), Sections 3.4 and 3.5, Algorithm 1; official code
mit-han-lab/Quest@01c1623bf9395009520874e989e29f683203b357, quest/models/QuestAttention.py and quest/utils/controller.py: the page
that the new token is in is always read and counts among the `budget / page_size` pages, the others are ranked by their bounds,
each query head for itself. evaluation/quest_attention.py gives the floor of three pages; there the last page competes with the
others, and the new token may not see itself. Bounds are of keys after their rotation. Only calls of one token choose (`q_len > 1`
is dense in both), and the first two layers never do.

Differs from the paper: none. Where the layer has a sliding window, pages that have left it are not chosen.

What it saves is reading, and not memory: to all keys and values come two vectors for each page, so that a little more is held than
without it. `read_bytes` of the cache says what the last token read of it, each query head on its own: one kernel for a group of
heads that share keys would read what they choose in common once.

Not here: the kernels that read pages where they lie. What is chosen is gathered first, and so written and read once more.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.protocol import gather_tokens
from refimpl.inference.kv_cache.retrieved.page_bounds import PageBounds
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.config import Config

LEAST_PAGES = 3  # of the official evaluation


@dataclass(frozen=True, kw_only=True)
class Quest:
    """A cache that is held whole and read in part.

    Args:
        budget: tokens that are read for one, whole pages and at least three; the official code's default.
        page_size: tokens of a page.
        dense_layers: first layers, which read all.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = Quest(budget=6, page_size=2, dense_layers=0).cache(config), torch.zeros(1, 1, 12, 4)
        >>> x[:, :, [3, 8]] = 1.0  # in pages 1 and 4
        >>> whole = cache.update(0, x, x, x, torch.arange(12)[None])
        >>> cache.update(0, *[x[:, :, 8:9]] * 3, torch.tensor([[12]]))[2].tolist()  # 12 alone is in the last page
        [[[2, 3, 8, 9, 12]]]
    """

    budget: int = 512
    page_size: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1; the official code's is 512")
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size} must be at least 1; the paper's is 16")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must be at least 0; the paper's are the first 2")

    @property
    def pages(self) -> int:
        """Pages that are read, the new token's own among them."""
        return max(LEAST_PAGES, self.budget // self.page_size)

    def cache(self, config: Config) -> "QuestCache":
        """An empty cache."""
        return QuestCache(lambda layer: _Layer(self, layer >= self.dense_layers, config.sliding_window[layer]))


class QuestCache(LayeredCache):
    """A `LayeredCache` that counts what it reads."""

    @property
    def read_bytes(self) -> int:
        """Bytes of keys, values and bounds that the last call read, over all rows and layers."""
        return sum(layer.read for layers in self._layers.values() for layer in cast("Iterable[_Layer]", layers))


class _Layer:
    """All keys and values, and the bounds of their pages."""

    def __init__(self, method: Quest, sparse: bool, window: int | None) -> None:
        self.pages, self.sparse, self.window = method.pages, sparse, window
        self.keys, self.values, self.bounds = Tokens(), Tokens(), PageBounds(method.page_size)
        self.read = 0

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ARG002 - tokens stand at their places
        """All tokens, or for a single one the pages that it reads, of each query head."""
        self.keys.append(k)
        self.values.append(v)
        if self.sparse:
            self.bounds.append(k)
        keys, values = self.keys.all(), self.values.all()
        if not self.sparse or k.shape[2] > 1 or self.bounds.pages <= self.pages:
            self.read = queries.shape[1] // k.shape[1] * keys.numel() * (k.element_size() + v.element_size())
            return keys, values, None
        at = self._chosen(queries[:, :, 0])
        heads = at.shape[1] // k.shape[1]
        grouped = torch.unflatten(at, 1, (-1, heads)).flatten(2)  # [rows, kv_heads, heads of the group times kept]
        found = [torch.unflatten(gather_tokens(x, grouped), 2, (heads, -1)).flatten(1, 2) for x in (keys, values)]
        bounds = heads * 2 * (self.bounds.pages - 1) * k[:, :, 0].numel() * k.element_size()
        self.read = bounds + sum(x.numel() * x.element_size() for x in found)
        return found[0], found[1], at

    def compress_prefill(self) -> None:
        """Nothing: all is held."""

    def _chosen(self, query: Tensor) -> Tensor:
        """Tokens that each head of `[rows, heads, head_dim]` reads, in order, `[rows, heads, kept]`."""
        size, last, n = self.bounds.size, self.bounds.pages - 1, self.keys.length
        upper = self.bounds.upper(query, last)
        if self.window is not None:
            upper[:, :, : max(0, n - self.window) // size] = float("-inf")
        page = upper.topk(self.pages - 1, dim=2).indices.sort(dim=2).values
        tokens = page.unsqueeze(3) * size + torch.arange(size, device=page.device)
        own = torch.arange(last * size, n, device=page.device).expand(*page.shape[:2], -1)
        return torch.cat((tokens.flatten(2), own), dim=2)
