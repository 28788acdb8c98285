"""Transformers' own quantized cache, with optimum-quanto, as a rival in the arena of the caches' speed.

    pip install optimum-quanto
    effllm bench kv-speed --plugin tools.quanto_cache:QuantoCache

It is quantized in groups along the channels of keys and of values (in the place of KIVI's keys along the tokens), holds recent
tokens as they came, and quantizes everything anew whenever these are full.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache

from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class QuantoCache:
    """Settings as transformers has them; groups and residual as KIVI's here.

    Args:
        bits: 2 or 4.
        group_size: numbers that share scale and zero.
        residual_length: recent tokens held as they came.
    """

    ARENA: ClassVar[dict[str, list[int]]] = {"bits": [2, 4]}

    bits: int = 4
    group_size: int = 32
    residual_length: int = 128

    def cache(self, config: Config) -> "Wrapped":
        """An empty cache.

        Raises:
            ImportError: optimum-quanto is not installed.
        """
        shape = LlamaConfig(
            num_hidden_layers=config.n_layers,
            hidden_size=config.d_model,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
        )
        return Wrapped(
            QuantizedCache(
                "quanto", shape, nbits=self.bits, q_group_size=self.group_size, residual_length=self.residual_length
            )
        )


class Wrapped:
    """Their cache, asked as ours are."""

    def __init__(self, theirs: QuantizedCache) -> None:
        self.theirs = theirs

    @property
    def length(self) -> int:
        """Tokens seen."""
        return int(self.theirs.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and recent tokens."""
        return sum(
            part.nbytes
            for layer in self.theirs.layers
            for name in ("_quantized_keys", "_quantized_values", "keys", "values")
            for part in _parts(getattr(layer, name, None))
        )

    def update(self, layer: int, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        """All keys and values."""
        every = self.theirs.update(k, v, layer)
        return every[0], every[1], None

    def compress_prefill(self) -> None:
        """Nothing: the prompt is quantized as it comes."""

    def reset(self) -> None:
        """Forget everything."""
        self.theirs.reset()  # type: ignore[no-untyped-call]


def _parts(held: Any) -> list[Tensor]:
    """The plain tensors inside a tensor of theirs."""
    if held is None:
        return []
    if type(held) is torch.Tensor:
        return [held]
    names, _ = held.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(held, name))]
