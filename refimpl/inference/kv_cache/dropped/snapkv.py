r"""SnapKV: of a prompt, its end, and for each head the tokens before that the end attends to, together with their neighbours.

Source: `snapkv` (arXiv 2404.14469), Section 4, Listing 1, Section 4.3 for the pooling; official code
FasterDecoding/SnapKV@e216ddc84c5bd210378cbdbbba12ba02102aa640, snapkv/monkeypatch/snapkv_utils.py (`update_kv`, and `init_snapkv`
for the defaults; its LongBench settings pool by maximum over 7). The weights of the last `window` queries are summed, pooled along the
tokens before the window, where averages count what is beyond the ends as 0, and the best are kept together with the window.
A prompt within the budget is kept. Afterwards nothing goes, and tokens are appended.

Differs from the paper: it stores a copy of the keys for each query head and lets each choose its own; here the cache holds what the
model has, and query heads that share a key head choose by the mean of their weights, taken before the pooling (as
Zefan-Cai/KVCache-Factory@c97f9d706d63d1b56e980f8b81b2a924c21162b3, pyramidkv/pyramidkv_utils.py, does in its layout of that kind). A
budget of `window` tokens or less, which the official code refuses, leaves all of it but one to the window.

Prompts read in chunks: all is kept until `compress_prefill`, and the choice is that of the prompt read at once. The peak is therefore that of
the full cache. A second prompt into the same cache is appended as decoded tokens are.

Not here: the kernel of the prefill; Mixtral's and Mistral's own attention, which the official code replaces.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks
from refimpl.inference.kv_cache.dropped.kept_tokens import KeptTokens
from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.model.config import Config

Pooling = Literal["average", "maximum"]


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """A cache whose prompt is compressed once.

    Args:
        budget: tokens of the prompt that are kept, window included; 2 or more.
        window: last tokens of the prompt, which are kept and whose queries choose the others.
        kernel: tokens pooled, odd; 1 pools nothing.
        pooling: over them, "average" or "maximum".

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = SnapKV(budget=5, window=2, kernel=3).cache(config), torch.ones(1, 1, 9, 4)
        >>> x[:, :, 3] = 9.0  # what the end of the prompt attends to
        >>> whole = cache.update(0, x, x, x, torch.arange(9)[None])
        >>> cache.compress_prefill()
        >>> cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[9]]))[2].tolist()
        [[[2, 3, 4, 7, 8, 9]]]
    """

    budget: int = 2048
    window: int = 32
    kernel: int = 5
    pooling: Pooling = "average"

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise ValueError(f"budget={self.budget} must be at least 2: the window, and a token before it")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1; the official code's is 32")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"kernel={self.kernel} must be odd and at least 1, to have a middle; the official code's is 5"
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(get_args(Pooling))}")

    @property
    def observing(self) -> int:
        """The window, within the budget."""
        return min(self.window, self.budget - 1)

    def chosen(self, layer: int, layers: int, length: int) -> int:  # noqa: ARG002 - for methods whose layers differ
        """Tokens before the window that a layer keeps of a prompt of this length."""
        return self.budget - self.observing

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache."""
        return LayeredCache(lambda layer: _Layer(self, layer, config))


def votes(
    queries: Tensor, keys: Tensor, kernel: int, pooling: Pooling = "average", sliding_window: int | None = None
) -> Tensor:
    r"""What the end of a prompt thinks of the tokens before: $\operatorname{pool}_j \sum_i A_{ij}$ (Listing 1, lines 8 to 13).

    Args:
        queries: `[rows, heads, window, head_dim]`, the prompt's last.
        keys: `[rows, kv_heads, tokens, head_dim]`, all of the prompt's.
        kernel: tokens pooled, odd.
        pooling: see `SnapKV`.
        sliding_window: of the layer.

    Returns:
        `[rows, kv_heads, tokens - window]`, float32 or wider, the mean over the query heads of each key head.
    """
    rows, kv_heads, tokens, _ = keys.shape
    before = tokens - queries.shape[2]
    at = torch.arange(tokens, device=keys.device).expand(rows, 1, tokens)
    received = keys.new_zeros((rows, kv_heads, before), dtype=torch.promote_types(keys.dtype, torch.float32))
    for weights in attention_blocks(queries, keys, at, before, sliding_window):
        received += weights[..., :before].sum(dim=3).mean(dim=2)
    pool = F.avg_pool1d if pooling == "average" else F.max_pool1d
    return pool(received, kernel, stride=1, padding=kernel // 2)


class _Layer:
    """Tokens, and until the prompt is over its last queries."""

    def __init__(self, method: SnapKV, layer: int, config: Config) -> None:
        self.method, self.layer, self.layers = method, layer, config.n_layers
        self.sliding_window = config.sliding_window[layer]
        self.held = KeptTokens()
        self.reading = True
        self.queries: Tensor | None = None  # [rows, heads, at most window, head_dim]

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that is held and the new tokens."""
        self.held.append(k, v, start)
        if self.reading:
            seen = queries if self.queries is None else torch.cat((self.queries, queries), dim=2)
            self.queries = seen[:, :, -self.method.observing :].clone(memory_format=torch.contiguous_format)
        return self.held.entries()

    def compress_prefill(self) -> None:
        """Cut the prompt to the layer's budget; later calls find no prompt, and do nothing."""
        queries, self.queries, self.reading = self.queries, None, False
        if queries is None or self.held.length <= self.method.budget:
            return
        method, held = self.method, self.held
        worth = votes(queries, held.keys, method.kernel, method.pooling, self.sliding_window)
        worth = F.pad(worth, (0, method.observing), value=float("inf"))
        held.cut(worth, method.observing + method.chosen(self.layer, self.layers, held.length))
