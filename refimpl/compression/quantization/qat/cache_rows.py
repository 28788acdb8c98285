r"""Keys and values rounded token by token, and attention whose cache holds them as packed bytes.

A token's row, all heads of its keys or of its values, has one symmetric grid; keys are rounded before they are rotated, and
rotated when they are read.

Source: `llm-qat` (arXiv 2305.17888), Section 2.2; official code facebookresearch/LLM-QAT@5ef1289730de080a4781f21ef27105b6c01b116a,
models/modeling_llama_quant.py, which rounds them there and caches them in floating point.

Differs from the paper: rows are really packed, each with a scale of four bytes.

Not here: caches other than `FullCache`, which hold the rounded values; rotation of the positions of the past at each step is paid for.
"""

from typing import Any

import torch
from torch import Tensor

from refimpl.compression.quantization.activations import Activations
from refimpl.compression.quantization.qat.straight_through import straight_through
from refimpl.model.bits import pack, unpack
from refimpl.model.cache import FullCache
from refimpl.model.model import Attention
from refimpl.model.rope import rotate
from refimpl.model.step import Step, positions_of


def round_rows(x: Tensor, bits: int) -> Tensor:
    """Rows `[..., width]` rounded each on its own symmetric grid, in their dtype, with the gradient straight through.

    Examples:
        >>> round_rows(torch.tensor([[7.0, -3.4, 0.6]]), 4).tolist()
        [[7.0, -3.0, 1.0]]
    """
    codes, scale = Activations(bits=bits).quantize(x.detach())
    return straight_through(x, codes * scale)


def pack_rows(x: Tensor, bits: int) -> Tensor:
    """Rows on their grids as bytes, `[..., ceil(width / 8) * bits + 4]`, uint8: codes, and the scale in float32.

    Examples:
        >>> pack_rows(torch.ones(2, 5, 16), 4).shape
        torch.Size([2, 5, 12])
    """
    codes, scale = Activations(bits=bits).quantize(x)
    packed = pack(codes.add_(2 ** (bits - 1)).to(torch.uint8), bits)
    return torch.cat([packed, scale.contiguous().view(torch.uint8)], dim=-1)


def unpack_rows(rows: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """The rows `[..., width]` that `pack_rows` was given, rounded."""
    codes = unpack(rows[..., :-4].contiguous(), bits, width)
    scale = rows[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    values: Tensor = (codes.float() - 2 ** (bits - 1)) * scale
    return values.to(dtype)


class RowAttention(Attention):
    """Attention whose keys and values a `FullCache` holds as packed rows; other caches hold the rounded values."""

    bits: int
    rotary: Any

    @classmethod
    def of(cls, attention: Attention, bits: int, rotary: Any) -> "RowAttention":
        """The same layer, with packed rows; its projections to keys and values round what they make, on the same grids.

        Args:
            attention: of a decoder.
            bits: of a code.
            rotary: of the decoder.
        """
        packed = cls.__new__(cls)
        vars(packed).update(vars(attention))
        packed.bits, packed.rotary = bits, rotary
        return packed

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        if type(step.cache) is not FullCache:
            return super().forward(x, step)
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, -1, self.head_dim)
        q = rotate((q if self.q_norm is None else self.q_norm(q)).transpose(1, 2), step.cos, step.sin)
        made = [projection(x) for projection in (self.k_proj, self.v_proj)]
        rows = [pack_rows(row, self.bits)[:, None] for row in made]  # one head of bytes
        rows = list(step.cache.update(self.layer, rows[0], rows[1], q, step.positions)[:2])
        kept, end = rows[0].shape[2], step.start + time
        k, v = (
            unpack_rows(row[:, 0], self.bits, of.shape[-1], x.dtype).view(batch, kept, -1, self.head_dim)
            for row, of in zip(rows, made, strict=True)
        )
        k = (k if self.k_norm is None else self.k_norm(k)).transpose(1, 2)
        k = rotate(k, *self.rotary(positions_of(end - kept, end, step.padding, x.device), x.dtype))
        mask, causal = step.mask(kept, None, self.window)
        options: dict[str, Any] = {"causal": causal} if mask is None else {"causal": False, "mask": mask}
        out = self.attend(q, k, v.transpose(1, 2), **options)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))  # type: ignore[no-any-return]
