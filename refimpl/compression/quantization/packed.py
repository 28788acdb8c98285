"""Integers of 1 to 8 bits, stored in that many bits, and the weight that is made of them.

Eight codes fill `bits` whole bytes, whatever `bits` is: code i of the eight begins at bit `i * bits`, and spills into the
next byte where it does not fit into this one.
"""

import torch
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import Granularity, dequantize, from_groups, to_groups


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flat bytes that hold the codes, `ceil(n / 8) * bits` of them.

    Examples:
        >>> pack(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8), 2).tolist()
        [57, 57]
    """
    flat = codes.flatten().to(torch.uint8)
    eights = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = eights.new_zeros(len(eights), bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= eights[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, i] >> (8 - shift)
    return packed.flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8.

    Examples:
        >>> unpack(torch.tensor([57, 57], dtype=torch.uint8), 2, 6).tolist()
        [1, 2, 3, 0, 1, 2]
    """
    words = packed.view(-1, bits)
    codes = packed.new_empty(len(words), 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes[:, i] = words[:, byte] >> shift
        if shift + bits > 8:
            codes[:, i] |= words[:, byte + 1] << (8 - shift)
    return codes.bitwise_and_(2**bits - 1).flatten()[:count]


class QuantizedWeight(CompressedWeight):
    """Packed codes with a scale, and where the grid is not symmetric a packed zero point, for each group.

    Args:
        codes: `[groups, size]`, uint8, as `affine.quantize` gives them for the groups of `affine.to_groups`.
        scale: `[groups]`.
        zero: `[groups]`; None for a symmetric grid, whose zero point is the middle.
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
        self.register_buffer("codes", pack(from_groups(codes, shape), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", None if zero is None else pack(zero, bits))

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
