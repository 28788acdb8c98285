r"""TOVA: at each step the token goes that the newest query attends to least, on the mean of all heads.

Source: `tova` (arXiv 2401.06104), Section 4 with Eq. (9), Appendix A for the mean over heads; official code
schwartz-lab-NLP/TOVA@9c7d09bfff64cfc92cfb5f9d7e138cb04866e5a7, src/tova_cache.py (`reduce`) and src/convert_models/llama_custom.py:
after every call the weights of its last query are averaged over all query heads, whatever key heads they share, and the layer
keeps the tokens with the largest, those of the call among them. Positions are those of the text.

Differs from the paper: none, but that its perplexities are of prompts from which a token goes at each position, by masks, where the
official code cuts a prompt once. Where several tokens have the same weight to the last digit, which of them goes is left open.

Prompts read in chunks: a chunk sees what was left of those before it and itself, and its last query cuts the cache, so that memory
is bounded by budget and chunk; a prompt read at once is seen whole, and its last query alone decides.

Not here: a choice for each head, which the paper finds worse; positions squeezed together for texts beyond the trained length
(Section 7.2); the paper's other policies (window, window with first tokens, H2O), which have their own modules.
"""

from dataclasses import dataclass

from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks
from refimpl.inference.kv_cache.dropped.kept_tokens import KeptTokens
from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class TOVA:
    """A cache of constant size, in each layer the same tokens for all heads.

    Args:
        budget: tokens kept between calls, the paper's multi-state size.

    Examples:
        >>> import torch
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = TOVA(budget=2).cache(config), torch.tensor([3.0, 1.0, 2.0]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
        >>> whole = cache.update(0, x, x, x, torch.arange(3)[None])  # the query likes large keys: 1 goes
        >>> cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[3]]))[2].tolist()
        [[0, 2, 3]]
    """

    budget: int = 2048

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1")

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache."""
        return LayeredCache(lambda layer: _Layer(self, config.sliding_window[layer]))


class _Layer:
    """Tokens, the same for all heads."""

    def __init__(self, method: TOVA, window: int | None) -> None:
        self.budget, self.window = method.budget, window
        self.held = KeptTokens(room=method.budget + 1, shared=True)

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that is held and the new tokens; then those go that the last query attends to least."""
        held, newest = self.held, start + k.shape[2] - 1
        held.append(k, v, start)
        found = held.entries()
        if held.length > self.budget:
            (weights,) = attention_blocks(queries[:, :, -1:], held.keys, held.positions, newest, self.window)
            held.cut(weights.mean(dim=(1, 2)), self.budget)  # [rows, 1, tokens]
        return found

    def compress_prefill(self) -> None:
        """Nothing: `update` has cut the prompt already."""
