"""Single entries of a matrix, kept in 16 bits beside its codes: compressed sparse rows."""

from typing import Any

import torch
from torch import Tensor, nn


class Outliers(nn.Module):
    """The entries of a matrix where a mask is set, as compressed sparse rows.

    An entry costs its value and two bytes for its column (four where there are more than 32,768), a row four bytes for the
    place where its entries begin. How many there are depends on the data, so that loading a state changes the sizes.

    Args:
        values: `[out, in]`.
        mask: `[out, in]`, which of them to keep.
        dtype: what they are stored in.

    Raises:
        ValueError: a value is too large for `dtype`.

    Examples:
        >>> kept = Outliers(torch.tensor([[0.0, 7.0], [8.0, 0.0]]), torch.tensor([[False, True], [True, False]]))
        >>> kept.put(torch.ones(2, 2)).tolist()
        [[1.0, 7.0], [8.0, 1.0]]
    """

    row_start: Tensor
    column: Tensor
    value: Tensor

    def __init__(self, values: Tensor, mask: Tensor, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        row, column = mask.nonzero(as_tuple=True)
        stored = values[row, column].to(dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(f"an outlier of {float(values[row, column].abs().max()):g} is beyond {dtype}")
        starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
        starts[1:] = mask.sum(dim=1).cumsum(dim=0)
        self.register_buffer("row_start", starts)
        self.register_buffer("column", column.to(torch.int16 if mask.shape[1] <= 2**15 else torch.int32))
        self.register_buffer("value", stored)

    def put(self, dense: Tensor) -> Tensor:
        """A copy of `dense`, `[out, in]`, with the entries in their places."""
        rows = torch.arange(len(dense), device=dense.device).repeat_interleave(self.row_start.diff())
        return dense.index_put((rows, self.column.long()), self.value.to(dense.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, here in self.named_buffers():
            there = state_dict.get(prefix + name)
            if there is not None and there.shape != here.shape:
                setattr(self, name, here.new_empty(there.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
