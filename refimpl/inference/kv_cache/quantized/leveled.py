"""Vectors rounded to levels that are not equally far apart, with outliers apart; packed, and appended to."""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.quantized.levels import Levels, nearest
from refimpl.inference.kv_cache.quantized.outliers import Outliers
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.bits import pack, unpack


class LeveledVectors:
    """Vectors `[rows, heads, n, length]` that grow along n; their scales lie elsewhere.

    Args:
        bits: 1 to 8.
        levels: `2^bits`, in [-1, 1]; they go to the device of the vectors.

    Examples:
        >>> levels = torch.tensor([-1.0, 1.0])
        >>> held, one, zero = LeveledVectors(1, Levels(levels, levels)), torch.ones(1), torch.zeros(1)
        >>> places, apart = torch.tensor([[[[2, 0]]]]), torch.tensor([[[[True, False]]]])
        >>> held.append(torch.tensor([[[[-0.5, 0.25, 8]]]]), one, zero, places, apart, torch.float16)
        >>> held.dense(3, one, zero).tolist()
        [[[[-1.0, 1.0, 8.0]]]]
    """

    def __init__(self, bits: int, levels: Levels) -> None:
        self.bits, self.levels = bits, levels
        self.codes, self.lacking = Tokens(), Outliers()

    @property
    def length(self) -> int:
        """Vectors held in each head, n."""
        return self.codes.length

    def append(
        self, x: Tensor, width: Tensor, middle: Tensor, places: Tensor, apart: Tensor, dtype: torch.dtype
    ) -> None:
        """Quantize vectors, and put them behind the last.

        Args:
            x: `[rows, heads, n, length]`, float32 or above.
            width: that of which levels are shares, broadcast to x.
            middle: where level 0 lies, the same.
            places: `[rows, heads, n, count]`, where outliers may stand in their vectors.
            apart: the same shape, whether one does; what it lacks to what its code gives is held, and 0 where none does.
            dtype: that it is held in.

        Raises:
            ValueError: what an outlier lacks is more than the dtype expresses.
        """
        encode, decode = self.levels
        moved = encode.to(x.device)
        self.levels = Levels(moved, moved if decode is encode else decode.to(x.device))
        codes = nearest((x - middle) / width, self.levels.encode)
        lack = (x - self._decoded(codes, width, middle)).gather(-1, places).masked_fill_(~apart, 0)
        self.codes.append(pack(codes, self.bits))
        self.lacking.append(lack, places, x.shape[-1], dtype)

    def dense(self, length: int, width: Tensor, middle: Tensor) -> Tensor:
        """All vectors `[rows, heads, n, length]`, expanded, in the dtype of width and middle, which lie as in `append`."""
        return self.lacking.add(self._decoded(unpack(self.codes.all(), self.bits, length), width, middle))

    def _decoded(self, codes: Tensor, width: Tensor, middle: Tensor) -> Tensor:
        values = self.levels.decode.to(width.dtype).index_select(0, codes.flatten().int())
        return torch.addcmul(middle, values.view(codes.shape), width)
