r"""H2O: the most recent tokens, and of those before them the ones that have received the most attention so far.

Source: `h2o` (arXiv 2306.14048), Algorithm 1, Section 4.2 for the place of the evicted being taken by the new, Section 5.1 for the
even split; official code FMInference/H2O@ac75c2a8a9e76832b2a4139b9363373b56336bfb, h2o_hf/utils_real_drop/modify_llama.py
(`H2OKVCache_LayerWise`): every call adds its queries' attention to the sums, new tokens included, and cuts the cache to heavy
hitters and recent tokens after that. A token's sum stays with it when others go. Positions are those of the text.

Differs from the paper: Algorithm 1 prints the attention of the current step as the score, and no recent part; here as in its text
and code the steps add up (Section 4.1, Figure 3), and recent tokens are safe. Half of an odd budget is rounded down for the heavy hitters. A key head that several query heads share
adds up their attention; paper and code have a key head for each query head. Sums are of a row, where the official code adds up
its batch (of one). The budget is a number of tokens and not a share of the prompt.

Prompts read in chunks: a chunk sees what was left of those before it and itself, and the cache is cut after each, so that memory is
bounded by budget and chunk; a prompt read at once is seen whole, and cut after that.

Not here: positions counted inside the cache, with which the official code streams without end; in a sliding-window layer, dropping
what has left the window first, which keeps its sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks
from refimpl.inference.kv_cache.dropped.kept_tokens import KeptTokens
from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class H2O:
    """A cache of constant size, for each head its own tokens.

    Args:
        budget: tokens kept between calls, heavy hitters and recent ones; the default is ours, the paper's is a fifth of the text.
        recent_share: share of the budget that goes to the most recent tokens, 0 to 1; the paper's ablation has 0 and 1, too.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = H2O(budget=4).cache(config), torch.zeros(1, 1, 10, 4)  # attention is even: the oldest have received most
        >>> whole = cache.update(0, x, x, x, torch.arange(10)[None])
        >>> cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[10]]))[2].tolist()
        [[[0, 1, 8, 9, 10]]]
    """

    budget: int = 2048
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1")
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"recent_share={self.recent_share} must be 0 to 1; the paper's is 0.5")

    @property
    def recent(self) -> int:
        """Recent tokens kept; the rest of the budget is for heavy hitters."""
        return int(self.budget * self.recent_share + 0.5)

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache."""
        return LayeredCache(lambda layer: _Layer(self, config.sliding_window[layer]))


class _Layer:
    """Tokens, with the attention that each has received as a note."""

    def __init__(self, method: H2O, window: int | None) -> None:
        self.budget, self.recent, self.window = method.budget, method.recent, window
        self.held = KeptTokens(room=method.budget + 1)

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that is held and the new tokens; then the lightest go, and the cache is within its budget."""
        held, newest = self.held, start + k.shape[2] - 1
        unseen = k.new_zeros((*k.shape[:3], 1), dtype=torch.promote_types(k.dtype, torch.float32))
        held.append(k, v, start, unseen)
        received = held.notes[..., 0]
        for weights in attention_blocks(queries, held.keys, held.positions, start, self.window):
            received += weights.sum(dim=(2, 3))
        found = held.entries()
        held.cut(received.masked_fill(held.positions > newest - self.recent, float("inf")), self.budget)
        return found

    def compress_prefill(self) -> None:
        """Nothing: `update` has cut the prompt already."""
