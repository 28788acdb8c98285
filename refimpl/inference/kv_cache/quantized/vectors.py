"""Vectors quantized in groups of neighbours, packed, and appended to."""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.quantized.groups import dequantize, quantize
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.bits import pack, unpack


class PackedVectors:
    """Vectors `[rows, heads, n, ..., length]` that grow along n; each is cut into groups with a scale and a minimum.

    Args:
        bits: 1 to 8.
        group_size: numbers of a group; the last of a vector has what is left. None takes a whole vector.

    Examples:
        >>> held, x = PackedVectors(2, 4), torch.tensor([0.0, 1, 2, 3, 10, 40]).view(1, 1, 1, 6)
        >>> held.append(x)
        >>> held.write(torch.empty(1, 1, 1, 6)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 10.0, 40.0]
    """

    def __init__(self, bits: int, group_size: int | None) -> None:
        self.bits, self.group_size = bits, group_size
        self.codes, self.scale, self.minimum = Tokens(), Tokens(), Tokens()

    @property
    def length(self) -> int:
        """Vectors held in each head, n."""
        return self.codes.length

    def append(self, x: Tensor) -> None:
        """Quantize vectors, and copy them behind the last.

        Raises:
            ValueError: a value is beyond what a grid of 16 bits expresses, or not finite.
        """
        length = x.shape[-1]
        codes, scale, minimum = quantize(self._grouped(x), -1, self.bits)
        self.codes.append(pack(codes.flatten(-2)[..., :length], self.bits))
        self.scale.append(scale.squeeze(-1))
        self.minimum.append(minimum.squeeze(-1))

    def write(self, out: Tensor, since: int = 0) -> Tensor:
        """Expand vectors.

        Args:
            out: `[rows, heads, n - since, ..., length]`, any floating dtype, which is computed in.
            since: the first of them.

        Returns:
            out.
        """
        packed, scale, minimum = (held.all()[:, :, since:] for held in (self.codes, self.scale, self.minimum))
        codes, scale, minimum = unpack(packed, self.bits, out.shape[-1]), scale.unsqueeze(-1), minimum.unsqueeze(-1)
        if out.shape[-1] % self._size(out.shape[-1]) == 0:
            dequantize(self._grouped(codes), scale, minimum, self._grouped(out))
            return out
        groups = self._grouped(codes)
        return out.copy_(
            dequantize(groups, scale, minimum, out.new_empty(groups.shape)).flatten(-2)[..., : out.shape[-1]]
        )

    def _size(self, length: int) -> int:
        return min(self.group_size or length, length)

    def _grouped(self, x: Tensor) -> Tensor:
        """`[..., groups, size]`; a last group that is short is filled up with its last number, which moves no end of its range."""
        size = self._size(x.shape[-1])
        missing = -x.shape[-1] % size
        if missing:
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
        return torch.unflatten(x, -1, (-1, size))
