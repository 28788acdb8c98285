r"""OWQ: keep the few columns that meet activation outliers in 16 bits, and round all others as GPTQ does.

Source: `owq` (arXiv 2306.02272), where weak columns are defined: the sensitivity of a column is
$\lambda_j \|\Delta W_{:,j}\|_2^2$ with $\lambda_j = H_{jj}$; official code xvyaward/owq@03cfc9941cfbe951ca7dbc614c66bc625fbb9857,
main.py for sensitivities and budget, owq/recon.py for the sweep, owq/quant.py for the search of grids.

Differs from the paper: the budget is one layer's, where the official code spreads the model's over its layers (with equal numbers
of columns in the attention projections, and fewer in the wider layers). One column is kept at least; the official code rounds to
even numbers, which its kernel wants, and so to none in a narrow layer. Grids of groups count every update so far, as in `gptq`.
Codes of weak columns are not stored; the official form keeps both.

Not here: weak-column tuning, the second version's fine-tuning of the columns that are kept; the kernel; `act_order`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.hessian import Sweep, inverse_factor, layer_hessian
from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import affine_grid, to_groups
from refimpl.compression.quantization.grid_search import moved_grid
from refimpl.compression.quantization.packed import QuantizedWeight

STEPS, STEPS_OF_A_GROUP = 100, 40  # widths that the search tries, for a whole channel and where it is repeated often


@dataclass(frozen=True, kw_only=True)
class OWQ:
    r"""Outlier-aware weight quantization.

    Args:
        bits: 1 to 8; the paper's are 3 and 4.
        extra_bits: mean bits per weight that may be added for weak columns: $k = d_{in} \cdot \text{extra} / (16 - bits)$ of them,
            rounded, at least one; 0 keeps none. The paper's are 0.01 and 0.1.
        group_size: neighbours in a channel that share a grid, weak columns left out; None is the whole channel.
        search: look for the grid of least error, `moved_grid`, instead of covering all weights.
        damping: share of the mean of $H$'s diagonal that is added to it, 0 or more.
        scale_dtype: what scales are stored in.

    Examples:
        >>> weight, inputs = torch.tensor([[0.3, 0.4, 3.0], [0.1, 0.7, 1.5]]), torch.diag(torch.tensor([1.0, 9.0, 1.0]))
        >>> packed = OWQ(bits=2)(weight, inputs)
        >>> packed.index.tolist(), packed.kept.T.tolist()
        ([1], [[0.39990234375, 0.7001953125]])
    """

    bits: int = 3
    extra_bits: float = 0.01
    group_size: int | None = None
    search: bool = True
    damping: float = 0.01
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if not 0 <= self.extra_bits <= 16 - self.bits:
            raise ValueError(f"extra_bits={self.extra_bits} must be 0 to {16 - self.bits}; the paper uses 0.01 and 0.1")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1, or None for whole channels")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; the paper uses 0.01")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> "MixedWeight":
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Columns whose inputs are all zero are set to zero.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs.

        Returns:
            Codes of the strong columns, and the weak ones in 16 bits; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                weight is too large for `scale_dtype` or 16 bits; the damping is too small for these inputs.
        """
        hessian, dead = layer_hessian("OWQ", weight, inputs)
        rows = weight.float().masked_fill(dead, 0)
        weak = self.sensitivity(rows, hessian.diagonal()).topk(self.weak_columns(weight.shape[1])).indices.sort().values
        strong = torch.ones_like(dead).index_fill(0, weak, value=False).nonzero()[:, 0]
        order = torch.cat([strong, weak])  # weak columns come last, and take all corrections in full
        columns = rows[:, order].T.contiguous()
        low = self._sweep(columns, inverse_factor(hessian, dead, self.damping, order), len(strong), weight)
        return MixedWeight(low, columns[len(strong) :].T, weak)

    def weak_columns(self, columns: int) -> int:
        """How many of a layer's columns are kept in 16 bits.

        Examples:
            >>> OWQ(bits=3, extra_bits=0.1).weak_columns(4096)
            32
        """
        share = self.extra_bits / (16 - self.bits)
        return min(max(round(columns * share), int(share > 0)), columns - 1)

    def sensitivity(self, weight: Tensor, energy: Tensor) -> Tensor:
        r"""$\lambda_j \|\Delta W_{:,j}\|_2^2$ of each column, `[in]`, its error that of plain rounding on each channel's grid.

        Args:
            weight: `[out, in]`, float32.
            energy: $\lambda$, `[in]`, the diagonal of H.
        """
        scale, zero = self._grids(weight, STEPS_OF_A_GROUP)
        step, zero = scale.float()[:, None], zero[:, None]
        rounded = (weight / step).round_().clamp_(-zero, 2**self.bits - 1 - zero).mul_(step)
        return energy * (weight - rounded).square_().sum(dim=0)

    def _sweep(self, columns: Tensor, factor: Tensor, strong: int, weight: Tensor) -> QuantizedWeight:
        """The first `strong` columns, `[in, out]`, rounded; the others are left corrected in `columns`."""
        size = strong if self.group_size is None else min(self.group_size, strong)
        steps = STEPS if size == strong else STEPS_OF_A_GROUP
        codes, grids = [], []
        for i, sweep in enumerate(Sweep(columns, factor, stop=strong)):
            if i % size == 0:
                scale, zero = self._grids(sweep.current(slice(i, min(i + size, strong))).T, steps)
                grids.append((scale, zero))
            q = torch.round(sweep.column / scale.float()).add_(zero).clamp_(0, 2**self.bits - 1)
            codes.append(q.to(torch.uint8))
            sweep.settle(q.sub_(zero).mul_(scale.float()))
        return QuantizedWeight(
            to_groups(torch.stack(codes, dim=1), "group", size),
            torch.stack([scale for scale, _ in grids], dim=1).flatten(),
            torch.stack([zero for _, zero in grids], dim=1).flatten(),
            bits=self.bits,
            granularity="group",
            shape=(weight.shape[0], strong),
            dtype=weight.dtype,
        )

    def _grids(self, group: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, `[out]`, for `[out, size]`."""
        if self.search:
            return moved_grid(group, self.bits, scale_dtype=self.scale_dtype, steps=steps)
        low, high = group.aminmax(dim=1)
        return affine_grid(low, high, self.bits, symmetric=False, scale_dtype=self.scale_dtype)


class MixedWeight(CompressedWeight):
    """Some columns of a weight in 16 bits, all others quantized.

    Args:
        low: the quantized columns, in their order.
        kept: `[out, k]`, the others; stored in the weight's dtype where it has 16 bits, else in float16.
        index: `[k]`, rising, where these stand.

    Raises:
        ValueError: a column that is kept is too large for 16 bits.
    """

    kept: Tensor
    index: Tensor

    def __init__(self, low: QuantizedWeight, kept: Tensor, index: Tensor) -> None:
        super().__init__()
        half = torch.bfloat16 if low.dtype == torch.bfloat16 else torch.float16
        self.low = low
        self.register_buffer("kept", kept.to(half).contiguous())
        self.register_buffer("index", index.to(torch.int16 if low.shape[1] + len(index) <= 2**15 else torch.int32))
        if not torch.isfinite(self.kept).all():
            raise ValueError(f"a weak column holds {float(kept.abs().max()):g}, which is beyond {half}")

    def dense(self) -> Tensor:
        r"""$\hat W$, `[out, in]`."""
        low, index = self.low.dense(), self.index.long()
        dense = low.new_empty(low.shape[0], low.shape[1] + len(index))
        strong = torch.ones(dense.shape[1], dtype=torch.bool, device=low.device).index_fill(0, index, value=False)
        dense[:, strong] = low
        dense[:, index] = self.kept.to(low.dtype)
        return dense
