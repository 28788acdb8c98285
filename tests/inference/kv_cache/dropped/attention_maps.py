"""What each layer of a decoder attends to."""

import torch

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks
from refimpl.model.cache import FullCache


class _Listening(FullCache):
    def __init__(self):
        super().__init__()
        self.heard = []

    def update(self, layer, k, v, queries, positions):
        self.heard.append((queries, k))
        return super().update(layer, k, v, queries, positions)


@torch.no_grad()
def attention_of(model, tokens):
    """Weights `[heads, time, time]` of each layer, of tokens `[1, time]`."""
    cache = _Listening()
    model.hidden(tokens, cache)
    at = torch.arange(tokens.shape[1]).view(1, 1, -1)
    return [torch.cat(list(attention_blocks(q, k, at, 0)), dim=3)[0].flatten(0, 1) for q, k in cache.heard]
