"""A weight as packed integer codes with a scale, and where needed a zero point, for each group."""

import torch
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import Granularity, dequantize, from_groups, to_groups
from refimpl.model.bits import pack, unpack


class QuantizedWeight(CompressedWeight):
    """Packed codes with a scale, and where the grid is not symmetric a packed zero point, for each group.

    Codes of all channels lie one after the other, without padding between channels.

    Args:
        codes: `[groups, size]`, uint8, as `affine.quantize` gives them for the groups of `affine.to_groups`.
        scale: `[groups]`.
        zero: `[groups]`, integers below `2^bits`; None for a symmetric grid, whose zero point is the middle.
        bits: 1 to 8.
        granularity: how the weight was cut into groups.
        shape: `(out, in)` of the weight.
        dtype: of the dense weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        granularity: Granularity,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.bits, self.granularity, self.shape, self.dtype = bits, granularity, shape, dtype
        self.group_size = codes.shape[1]
        self.register_buffer("codes", pack(from_groups(codes, shape).flatten(), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", None if zero is None else pack(zero.to(torch.uint8), bits))

    def dense(self) -> Tensor:
        r"""$\hat W = (Q - Z) s$, `[out, in]`."""
        rows, columns = self.shape
        codes = unpack(self.codes, self.bits, rows * columns).view(rows, columns)
        if self.zero is None:
            zero = torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.float32)
        else:
            zero = unpack(self.zero, self.bits, self.scale.numel()).float()
        groups = to_groups(codes, self.granularity, self.group_size)
        return from_groups(dequantize(groups, self.scale, zero), self.shape).to(self.dtype)
