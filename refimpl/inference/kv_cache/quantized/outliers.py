"""A few numbers of each vector, kept apart in 16 bits together with where they stand."""

import torch
from torch import Tensor

from refimpl.inference.kv_cache.tokens import Tokens


class Outliers:
    """Numbers `[rows, heads, n, ..., count]` of vectors `[rows, heads, n, ..., length]`, that grow along n.

    Examples:
        >>> held = Outliers()
        >>> held.append(torch.tensor([[[[9.0, -9.0]]]]), torch.tensor([[[[4, 0]]]]), length=5)
        >>> held.put(torch.zeros(1, 1, 1, 5)).flatten().tolist(), held.nbytes
        ([-9.0, 0.0, 0.0, 0.0, 9.0], 6)
    """

    def __init__(self) -> None:
        self.values, self.places = Tokens(), Tokens()

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        return self.values.nbytes + self.places.nbytes

    def append(self, values: Tensor, places: Tensor, length: int, dtype: torch.dtype = torch.float16) -> None:
        """Copy numbers behind the last; none of each vector are nothing.

        Args:
            values: `[rows, heads, n, ..., count]`.
            places: the same shape, where they stand in their vector; held in the narrowest integers that count to its length.
            length: of a vector.
            dtype: what numbers are held in.

        Raises:
            ValueError: a number that the dtype does not express.
        """
        if values.shape[-1]:
            self.values.append(stored(values, dtype))
            self.places.append(
                places.to(torch.uint8 if length <= 2**8 else torch.int16 if length <= 2**15 else torch.int32)
            )

    def put(self, dense: Tensor) -> Tensor:
        """Write the numbers to their places in all vectors, and return these."""
        if not self.values.length:
            return dense
        return dense.scatter_(-1, self.places.all().long(), self.values.all().to(dense.dtype))

    def add(self, dense: Tensor) -> Tensor:
        """Add the numbers to what stands at their places in all vectors, and return these."""
        if not self.values.length:
            return dense
        return dense.scatter_add_(-1, self.places.all().long(), self.values.all().to(dense.dtype))


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in the dtype that they are held in.

    Raises:
        ValueError: one is beyond what it expresses, or not finite.

    Examples:
        >>> stored(torch.tensor([65504.0]), torch.float16).tolist()
        [65504.0]
    """
    found = values.to(dtype)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"values up to {float(values.abs().max()):g} do not fit {dtype}, finite; move the model to bfloat16"
        )
    return found
