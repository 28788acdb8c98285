r"""GPTQ: round a weight column by column, and let the columns still to come make up for each column's error.

Source: `gptq` (arXiv 2210.17323), Eq. (2) and (3), Section 4 with Algorithm 1; Section 5 for groups, whose grids follow from
the updated weights; official code IST-DASLab/gptq@2d65066eeb06a5c9ff5184d8cebdf33662c67faf, gptq.py, for dead columns,
`act_order` and static groups.

Differs from the paper: the factor of the inverse Hessian is made as `hessian` states. The grid of a group counts every update so
far; in the official code those of the current block of 128 columns are missing from it, where a group begins inside a block.
Dead columns do not count in a channel's grid. Grids are those of `rtn`, scales rounded up to `scale_dtype`. With `act_order`,
groups keep the grids of the original weight (static groups), so that no permutation needs to be stored. Over a model,
all layers before a layer are compressed when its inputs are taken, those of its own block too (`true-sequential` in the
official code); the paper takes the inputs of all layers of a block before it quantizes any of them.

Not here: grids clipped for the least squared error; convolutions; integer kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.hessian import BLOCK, Sweep, inverse_factor, layer_hessian
from refimpl.compression.quantization.affine import affine_grid, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    r"""Post-training quantization with second-order error compensation.

    Args:
        bits: 1 to 8.
        group_size: neighbours in a channel that share a grid, the last group of a channel may be shorter; None is the whole
            channel, as in the paper's main tables. 128 is ours, as in `rtn`.
        symmetric: the range is $[-m, m]$ and no zero point is stored.
        act_order: visit columns in order of falling $H_{jj}$, the inputs' mean square.
        damping: share of the mean of $H$'s diagonal that is added to it, 0 or more.
        scale_dtype: what scales are stored in.

    Examples:
        Two inputs that are always equal: what is rounded off the first weight is made up by the second.

        >>> weight, inputs = torch.tensor([[0.4, 0.4, 3.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> GPTQ(bits=2, group_size=None)(weight, inputs).dense().tolist()
        [[0.0, 1.0, 3.0]]
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1, or None for whole channels")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; the paper uses 0.01")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Columns whose inputs are all zero are set to zero.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs; more rows than `in`; the paper takes 128 texts of
                2048 tokens.

        Returns:
            Packed codes, scales and zero points, as those of `rtn`; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                weight is too large for `scale_dtype`; the damping is too small for these inputs.
        """
        hessian, dead = layer_hessian("GPTQ", weight, inputs)
        columns = weight.float().masked_fill(dead, 0).T.contiguous()  # [in, out]: a column of W is a row of it
        size = weight.shape[1] if self.group_size is None else min(self.group_size, weight.shape[1])
        order = hessian.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        factor = inverse_factor(hessian, dead, self.damping, order)
        codes, scale, zero = self._sweep(columns, factor, size, order)
        return QuantizedWeight(
            to_groups(codes.T, "group", size),
            scale.T.flatten(),
            None if self.symmetric else zero.T.flatten(),
            bits=self.bits,
            granularity="group",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
        )

    def _sweep(
        self, columns: Tensor, factor: Tensor, size: int, order: Tensor | None, block: int = BLOCK
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 1: codes `[in, out]`, scales and zero points `[groups, out]`.

        Args:
            columns: `[in, out]`, overwritten by columns updated for all blocks before their own.
            factor: $U$, as `inverse_factor` gives it.
            size: columns in a group.
            order: the columns in the order in which they are visited; None stands for 0, 1, 2, ….
            block: columns in a block; no result depends on it but for rounding.
        """
        n, top = len(columns), 2**self.bits - 1
        grids = [self._grid(columns[j : j + size]) for j in range(0, n, size)] if order is not None else []
        visited = range(n) if order is None else order.tolist()
        columns = columns if order is None else columns[order]
        codes = torch.empty_like(columns, dtype=torch.uint8)
        for i, sweep in enumerate(Sweep(columns, factor, block)):
            if order is None and i % size == 0:  # the group as it stands, this block's errors included
                grids.append(self._grid(sweep.current(slice(i, min(i + size, n)))))
            scale, zero = grids[visited[i] // size]
            scale = scale.float()
            q = torch.round(sweep.column / scale).add_(zero).clamp_(0, top)
            codes[visited[i]] = q
            sweep.settle(q.sub_(zero).mul_(scale))
        return codes, torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])

    def _grid(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, `[out]`, for columns `[size, out]`."""
        low, high = group.aminmax(dim=0)
        return affine_grid(low, high, self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)
