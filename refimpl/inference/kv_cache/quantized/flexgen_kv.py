r"""FlexGen's cache: keys and values in 4 bits, with a scale and a minimum for each group of 64 neighbouring channels of a token.

Source: `flexgen` (arXiv 2303.06865), the section on approximate methods, group-wise quantization; official code
FMInference/FlexLLMGen@004ffef82b46e8dc8685c55d0cdda650bdaf1269, flexllmgen/compression.py for the quantizer, pytorch_backend.py
(`mha`, `mha_gen`) for its moments, flex_opt.py for groups along the head's channels (`group_dim=2`) of 64, for keys and values alike.

Differs from the paper: what is stored is the step, rounded outward to 16 bits as the minimum is, so that the bound s/2 holds for what is
stored; the official code stores the reciprocal of the step, and a group of equal numbers is 0/0 there. The last group of a head that
64 does not divide is shorter; the official code fills it up with zeros, which stretch its range, and stores them. Bits other than 4
are allowed. Prompts read in chunks: a chunk sees what is held of those before it, and itself as it is.

Not here: offloading, and where the cache lies (`flexgen-offload`); weights in 4 bits; attention to the largest scores only. A layer's keys
and values are expanded for as long as it attends, as in the official code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.quantized.vectors import PackedVectors
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class FlexGenKV:
    """The cache in `bits` bits a number; every token is quantized as soon as it has been attended to.

    Args:
        bits: 1 to 8; the paper's are 4.
        group_size: neighbouring channels of a token, within a head, that share scale and minimum.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=40)
        >>> cache, x = FlexGenKV().cache(config), torch.randn(1, 1, 10, 64)
        >>> k, v, _ = cache.update(0, x, x, x, torch.arange(10)[None])
        >>> cache.nbytes == 2 * 10 * 64 * (4 + 32 / 64) / 8
        True
    """

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8; the paper uses 4")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; the paper uses 64")

    def cache(self, config: Config) -> LayeredCache:  # noqa: ARG002 - the protocol's
        """An empty cache; a sliding-window layer's too holds all of its past."""
        return LayeredCache(lambda _: _Layer(self))


class _Layer:
    """Packed keys and packed values."""

    def __init__(self, method: FlexGenKV) -> None:
        self.held = [PackedVectors(method.bits, method.group_size) for _ in range(2)]  # keys, values

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, None]:  # noqa: ARG002 - the protocol's
        """Everything before, expanded, and the new tokens as they are; these are quantized for the next call."""
        k_all, v_all = (self._all(held, new) for held, new in zip(self.held, (k, v), strict=True))
        for held, new in zip(self.held, (k, v), strict=True):
            held.append(new)
        return k_all, v_all, None

    def compress_prefill(self) -> None:
        """Nothing: `update` has quantized the prompt already."""

    @staticmethod
    def _all(held: PackedVectors, new: Tensor) -> Tensor:
        past = held.length
        if not past:
            return new
        every = torch.empty(*new.shape[:2], past + new.shape[2], new.shape[3], dtype=new.dtype, device=new.device)
        held.write(every[:, :, :past])
        every[:, :, past:] = new
        return every
