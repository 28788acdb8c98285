r"""Scissorhands: those go, many at a time, that were least often pivotal of late: had more than their even share of the attention.

Source: `scissorhands` (arXiv 2305.17118), Algorithms 1 and 2, Section 4.1 for w = 400, r = 10, m = B / 2 and for the record that is
kept while tokens come instead of attention being computed anew. The first author's code,
lzcemma/Scissorhands@d0bf444b7f78127b2052fe8edfd4d386efd33455, Decentralized_FM_alpha/modules/hf_opt_dropkv.py, has no cache: it masks
a whole text with another rule (what no query of the window gives more than 90 % of its entries get), and marks scores above it.

Differs from the paper: the preprint's Algorithm 2 counts scores above 1/t and drops the lowest counts, the conference's counts those
below and drops the highest. The two are one order where a query from before a token counts as one that gives it nothing, as
causal attention computed anew has it, and so it is here; a count of low scores that starts with the token would spare the young
ones. As printed, both clear the counts of all but the recent tokens; here the recent ones are kept, as comment and text say. Its t is both the
step and the length of the record; once tokens are dropped these are not the same, and the even share here is 1 over the entries
that a query sees. Of equal counts, which the paper leaves open, the older goes. A key head that several query heads share counts
by their mean attention; the paper's OPT has a key head for each.

Prompts: what the loop would do token by token is done once, after the prompt or chunk, with its last w queries. If a prompt is above the
budget by more than m, as many go as are above it. A chunk sees what was left of those before it and itself, so that memory is
bounded by budget and chunk.

Not here: more budget for later layers, for which the paper has a rule of thumb and no formula; 4-bit quantization of what is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks, visible
from refimpl.inference.kv_cache.dropped.kept_tokens import KeptTokens
from refimpl.inference.kv_cache.dropped.recent_marks import count_marks, mark, ring_bytes
from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class Scissorhands:
    """A cache that fills up to its budget and is then cut to half of it, for each head its own tokens.

    Args:
        budget: B, tokens kept at most; the default is ours, the paper's are shares of the text.
        history: w, queries whose attention counts.
        recent: r, most recent tokens, which go last.
        drop_share: m / B, share of the budget that goes at once, above 0 and at most 1; at least one token does.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = Scissorhands(budget=6, recent=2).cache(config), torch.ones(1, 1, 7, 4)
        >>> x[:, :, 1] = x[:, :, 3] = 3.0  # these two receive more than their share
        >>> whole = cache.update(0, x, x, x, torch.arange(7)[None])  # one above the budget: three go
        >>> cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[7]]))[2].tolist()
        [[[1, 3, 5, 6, 7]]]
    """

    budget: int = 2048
    history: int = 400
    recent: int = 10
    drop_share: float = 0.5

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1")
        if self.history < 1:
            raise ValueError(f"history={self.history} must be at least 1; the paper counts 400 queries")
        if self.recent < 0:
            raise ValueError(f"recent={self.recent} must be at least 0; the paper keeps 10")
        if not 0 < self.drop_share <= 1:
            raise ValueError(f"drop_share={self.drop_share} must be above 0 and at most 1; the paper drops 0.5")

    @property
    def drop(self) -> int:
        """m, tokens that go at once."""
        return max(1, int(self.budget * self.drop_share + 1e-9))  # 0.29 of 100 are 29

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache."""
        return LayeredCache(lambda layer: _Layer(self, config.sliding_window[layer]))


class _Layer:
    """Tokens, with the marks of the queries to which they were pivotal as notes."""

    def __init__(self, method: Scissorhands, window: int | None) -> None:
        self.method, self.window = method, window
        self.held = KeptTokens(room=method.budget + 1)

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that is held and the new tokens; then, if they are above the budget, m and more of them go."""
        held, method, newest = self.held, self.method, start + k.shape[2] - 1
        held.append(k, v, start, k.new_zeros((*k.shape[:3], ring_bytes(method.history)), dtype=torch.uint8))
        self._record(queries[:, :, -method.history :], newest)
        found = held.entries()
        if held.length > method.budget:
            at = held.positions.long()
            counts = count_marks(held.notes, newest, method.history)
            counts.masked_fill_(at > newest - method.recent, method.history + 1)
            held.cut(counts * (newest + 1) + at, min(held.length - method.drop, method.budget))
        return found

    def compress_prefill(self) -> None:
        """Nothing: `update` has cut the prompt already."""

    def _record(self, queries: Tensor, newest: int) -> None:
        """Mark the tokens of which these queries, the last of which is the newest token's, take more than evenly."""
        held, first = self.held, newest - queries.shape[2] + 1
        for weights in attention_blocks(queries, held.keys, held.positions, first, self.window):
            time = weights.shape[3]
            share = 1 / visible(held.positions, first, time, self.window).sum(dim=-1, keepdim=True).to(weights.dtype)
            mark(held.notes, weights.mean(dim=2) > share, first)
            first += time
