r"""A cache of this family inside a model of `transformers`: the same object, asked through the interface that its models know.

Source: none; the interface is `Cache` of transformers 5, `cache_utils.py`.

Differs from the paper: none; what a method does, it does here too.

Not here: caches that drop or place tokens, whose answers say where each key stands, which those models do not ask; caches that
need queries, which they do not tell; beams and going back, which reorder or cut what is held.

    >>> from refimpl.inference.kv_cache.quantized.kivi import KIVI
    >>> from refimpl.model.config import Config
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=40)
    >>> past = InTransformers(KIVI(bits=4).cache(config), config.n_layers)
    >>> past.get_seq_length(), past.nbytes        # model.generate(tokens, past_key_values=past)
    (0, 0)
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TheirCache
from transformers.cache_utils import CacheLayerMixin

from refimpl.model.cache import Cache


class InTransformers(TheirCache):
    """What `model.generate(tokens, past_key_values=…)` and `model(tokens, past_key_values=…)` take.

    The prompt counts as read once a single token follows it; then the cache is told so.

    Args:
        cache: an empty cache of a method that keeps all tokens.
        n_layers: of the model.
        padding: `[batch]`, tokens of left padding in each row, as the attention mask has them; None stands for no padding.
    """

    def __init__(self, cache: Cache, n_layers: int, padding: Tensor | None = None) -> None:
        self.cache, self.padding, self._told = cache, padding, False
        self.own = [_Layer(self, layer) for layer in range(n_layers)]
        super().__init__(layers=list(self.own))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.cache.nbytes

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self._told = False
        for layer in self.own:
            layer.seen = 0

    def take(self, layer: int, seen: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values, after `seen` tokens; all that are to be attended to."""
        if k.shape[2] == 1 and seen and not self._told:
            self.cache.compress_prefill()
            self._told = True
        positions = torch.arange(seen, seen + k.shape[2], device=k.device)[None]
        if self.padding is not None:
            positions = positions - self.padding.to(k.device)[:, None]
        every, values, at = self.cache.update(layer, k, v, k, positions)
        if (at is not None and self.padding is None) or every.shape[2] != seen + k.shape[2]:
            raise ValueError(
                f"{type(self.cache).__name__} gives back {every.shape[2]} of {seen + k.shape[2]} tokens at places of its own: "
                "a model of transformers can't be told where; run the method in refimpl.model"
            )
        return every, values


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part of the interface."""

    def __init__(self, whole: InTransformers, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole, self.layer, self.seen = whole, layer, 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache makes its own tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at the end."""
        found = self.whole.take(self.layer, self.seen, key_states, value_states)
        self.seen += key_states.shape[2]
        return found

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call gives back, and the position of the first."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No most."""
        return -1

    def reset(self) -> None:
        """Forget everything, in all layers."""
        self.whole.reset()

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        """Not here."""
        raise NotImplementedError(
            "a compressed cache can't reorder its rows for beams; use sampling or greedy decoding"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not here."""
        raise NotImplementedError("a compressed cache can't go back; assisted decoding needs one that can")
