r"""Attention that holds its keys and values in few bits, keys turned by a Hadamard matrix.

A key's outliers sit in a few channels; turned, they are spread, and a grid for the whole vector fits.

Source: `quarot` (arXiv 2404.00456), Section 4, stages 1d and 2c, and Section 5 (Setup) for grids and clipping; official code
spcl/QuaRot@5008669b08c1f11f9b64d52d16fddd47ca754c5a, fake_quant/rotation_utils.py, QKRotationWrapper.

Differs from the paper: keys are turned before they are quantized, and back when they are read, instead of the queries with them:
the scores are the same, and attention and caches may be replaced. It costs the transform of all keys that are read, not of one query.

Not here: layers other than those of `refimpl.model`; kernels that read packed rows.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.compression.hadamard import turn
from refimpl.compression.quantization.affine import affine_grid, dequantize, quantize
from refimpl.model.bits import pack, unpack
from refimpl.model.cache import Cache, FullCache
from refimpl.model.model import Attention
from refimpl.model.step import Step

CLIP, GROUP = 0.95, 128  # Section 5, Setup


class QuantizedAttention(Attention):
    """Attention whose keys and values are held in few bits: `FullCache` holds packed rows, any other cache the rounded values."""

    bits: int

    @classmethod
    def of(cls, attention: Attention, bits: int) -> "QuantizedAttention":
        """The same layer, with a quantized cache."""
        quantized = cls.__new__(cls)
        vars(quantized).update(vars(attention))
        quantized.bits = bits
        return quantized

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        held: Any = _Rounding(step.cache, self.bits)
        return super().forward(x, dataclasses.replace(step, cache=held))


@dataclass
class _Rounding:
    """A cache that rounds what it is given, in front of another or of none."""

    inner: Cache | None
    bits: int

    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Cache.update`: keys come back turned as they came."""
        rows, dim, dtype = [pack_rows(turn(k), self.bits), pack_rows(v, self.bits)], k.shape[-1], k.dtype
        seen = None
        if type(self.inner) is FullCache:
            rows = list(self.inner.update(layer, rows[0], rows[1], queries, positions)[:2])
        keys, values = (unpack_rows(row, self.bits, dim, dtype) for row in rows)
        keys = turn(keys, back=True)
        if self.inner is not None and type(self.inner) is not FullCache:
            keys, values, seen = self.inner.update(layer, keys, values, queries, positions)
        return keys, values, seen


def pack_rows(x: Tensor, bits: int) -> Tensor:
    """Quantize vectors to asymmetric grids: bytes, of each group its packed codes, its scale (2) and its zero point (1).

    Args:
        x: `[..., dim]`.
        bits: 1 to 8.

    Returns:
        `[..., groups * bytes]`, uint8.

    Examples:
        >>> pack_rows(torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]), 4).shape
        torch.Size([1, 7])
    """
    groups = x.reshape(-1, _group(x.shape[-1])).float()
    low, high = groups.aminmax(dim=1)
    scale, zero = affine_grid(CLIP * low, CLIP * high, bits, symmetric=False, scale_dtype=torch.float16)
    codes = pack(quantize(groups, scale, zero, bits), bits)
    return torch.cat([codes, scale[:, None].view(torch.uint8), zero[:, None].to(torch.uint8)], dim=1).view(
        *x.shape[:-1], -1
    )


def unpack_rows(rows: Tensor, bits: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The vectors `[..., dim]` that `pack_rows` has rounded."""
    size = _group(dim)
    groups = rows.reshape(-1, rows.shape[-1] * size // dim)
    codes = unpack(groups[:, :-3].contiguous(), bits, size)
    scale = groups[:, -3:-1].clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(1)
    return dequantize(codes, scale, groups[:, -1]).view(*rows.shape[:-1], dim).to(dtype)


def _group(dim: int) -> int:
    return GROUP if dim % GROUP == 0 else dim
