r"""KIVI: keys quantized per channel, values per token, and the most recent tokens kept as they are.

Source: `kivi` (arXiv 2402.02750), Section 3.1 for the quantizer, Section 3.2 for the two groupings, Section 3.3 and Algorithm 1
for the residual; official code jy-yuan/KIVI@876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6, models/llama_kivi.py and quant/new_pack.py,
whose defaults (group 32, residual 128) and whose moments of quantization these are.

Differs from the paper: scale and minimum are rounded outward to their 16 bits, so that the bound s/2 holds for what is stored; a
group of equal numbers gets a tiny scale instead of 0/0. Padding never enters a group: each row's groups begin at its own first token,
where the official code quantizes padding along with the rest. Prompts read in chunks: a chunk sees what is held of those
before it, and itself as it is; the official code reads a prompt at once.

Not here: the product with packed keys in one kernel. A layer's keys and values are expanded for as long as it attends, then
dropped; a step reads and writes all of them, and so is slower than with an uncompressed cache that fits into memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.quantized.groups import dequantize, quantize
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.bits import pack, unpack
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class KIVI:
    r"""The cache in `bits` bits a number.

    With R = `residual_length`, of n tokens the first $\lfloor n/R \rfloor R$ have quantized keys and the first $n - R$ quantized
    values; the rest is held as it came.

    Args:
        bits: 1 to 8; the paper's are 2 and 4.
        group_size: G, numbers that share scale and minimum: of a key channel in G tokens, of a value in G neighbouring
            channels. It must divide the decoder's `head_dim`, as the official code demands.
        residual_length: R, a multiple of G.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=40)
        >>> cache, x = KIVI(residual_length=32).cache(config), torch.randn(1, 1, 64, 32)
        >>> k, v, _ = cache.update(0, x, x, x, torch.arange(64)[None])  # of 64 keys all are quantized, of 64 values 32
        >>> cache.nbytes == (64 + 32) * 32 * (2 + 32 / 32) / 8 + 32 * 32 * 4
        True
    """

    bits: int = 2
    group_size: int = 32
    residual_length: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8; the paper uses 2 and 4")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; the paper uses 32")
        if self.residual_length < 1 or self.residual_length % self.group_size:
            raise ValueError(
                f"residual_length={self.residual_length} must be a multiple of group_size={self.group_size}, above 0: "
                "keys leave it in whole groups"
            )

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache; a sliding-window layer's too holds all of its past.

        Raises:
            ValueError: `group_size` does not divide the head.
        """
        if config.head_dim % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} must divide head_dim={config.head_dim}: a value's groups lie in one token"
            )
        return LayeredCache(lambda _: _Layer(self))


class _Layer:
    """Packed keys and values, and the recent tokens of each as they came."""

    def __init__(self, method: KIVI) -> None:
        self.residual = method.residual_length
        self.keys = _Packed(method, axis=2)
        self.values = _Packed(method, axis=3)
        self.recent: list[Tensor] = []  # keys, values

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, None]:  # noqa: ARG002 - the protocol's
        """Everything before, expanded, and the new tokens; then what leaves the residual is quantized."""
        recent = self.recent or [k[:, :, :0], v[:, :, :0]]
        k, v = self.keys.before(recent[0], k), self.values.before(recent[1], v)
        seen = k.shape[2]
        self.recent = [self.keys.take(k, seen % self.residual), self.values.take(v, min(seen, self.residual))]
        return k, v, None

    def compress_prefill(self) -> None:
        """Nothing: `update` has quantized the prompt already."""


class _Packed:
    """Quantized tokens: groups of G along axis 2, the tokens, or 3, the channels."""

    def __init__(self, method: KIVI, axis: int) -> None:
        self.bits, self.size, self.axis = method.bits, method.group_size, axis
        self.codes, self.scale, self.minimum = Tokens(), Tokens(), Tokens()

    def before(self, recent: Tensor, new: Tensor) -> Tensor:
        """All tokens `[rows, kv_heads, tokens, head_dim]`: those held here expanded, then `recent`, then `new`."""
        held, between = self.codes.length, self.codes.length + recent.shape[2]
        if not between:
            return new
        every = new.new_empty(*new.shape[:2], between + new.shape[2], new.shape[3])
        every[:, :, held:between], every[:, :, between:] = recent, new
        if held:
            codes = self._grouped(unpack(self.codes.all(), self.bits, new.shape[3]))
            dequantize(codes, self.scale.all(), self.minimum.all(), self._grouped(every[:, :, :held]))
        return every

    def take(self, every: Tensor, keep: int) -> Tensor:
        """Quantize what of all tokens is not held yet, but for the last `keep`; return a copy of these."""
        held, end = self.codes.length, every.shape[2] - keep
        if end > held:
            codes, scale, minimum = quantize(self._grouped(every[:, :, held:end]), self.axis + 1, self.bits)
            self.codes.append(pack(codes.flatten(self.axis, self.axis + 1), self.bits))
            self.scale.append(scale)
            self.minimum.append(minimum)
        return every[:, :, end:].clone(memory_format=torch.contiguous_format)

    def _grouped(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, self.axis, (-1, self.size))
