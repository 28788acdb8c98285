r"""OBQ: round one weight at a time, always the cheapest, and let all that are left make up for its error.

Source: `obc` (arXiv 2208.11580), Section 5, The Optimal Brain Quantizer, with the elimination of Lemma 1; official code
IST-DASLab/OBC@9b7979bfc9ee20d87db553823a32ee9890beaa99, trueobs.py (`quantize`), also for weights beyond half a step, quant.py for
the grid, and main_trueobs.py for the defaults.

Differs from the paper: the Hessian is damped by one percent of its mean diagonal, as GPTQ does when it compares itself with OBQ;
the official code damps nothing unless told to, and adds 1 to the diagonal if the factorization fails. The inverse of a row is not
rewritten at each step but every 64: the vectors that the steps subtract are kept apart meanwhile, and only what a step needs is
computed, which gives the same numbers up to rounding and reads a fraction of the memory. Scales are stored in float16.

Not here: pruning (the other half of `obc`), weights of a pruned layer that must stay zero, activations, groups.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from refimpl.compression.hessian import inverse_factor, layer_hessian
from refimpl.compression.quantization.affine import affine_grid
from refimpl.compression.quantization.grid_search import shrunk_grid
from refimpl.compression.quantization.packed import QuantizedWeight

ROWS = 32  # rows at once, as in the official code: each has its own inverse
STEPS = 64  # after which inverses are written anew


@dataclass(frozen=True, kw_only=True)
class OBQ:
    r"""Optimal Brain Quantization: each row of the weight in its own greedy order.

    Time grows as $d_{out}\, d_{in}^3 / 6$: meant for layers of up to about a thousand inputs.

    Args:
        bits: 1 to 8.
        symmetric: the range is $[-m, m]$ and no zero point is stored; the official default, where this one is as in `rtn`.
        grid: of each channel; "clipped" is the official default, see `shrunk_grid`, "range" covers all weights, as in `rtn`.
        order: "greedy", or "given": first column first, for all rows, which is what GPTQ does.
        damping: share of the mean of $H$'s diagonal that is added to it, 0 or more.
        scale_dtype: what scales are stored in.

    Examples:
        The third weight lies on a level and goes first. Of the other two, whose inputs are always equal, the cheaper goes next,
        0.9, and the last makes up for its error: 0.4 - 0.1 is rounded to 0.

        >>> weight, inputs = torch.tensor([[0.4, 0.9, 3.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> OBQ(bits=2, grid="range")(weight, inputs).dense().tolist()
        [[0.0, 1.0, 3.0]]
    """

    bits: int = 4
    symmetric: bool = False
    grid: Literal["clipped", "range"] = "clipped"
    order: Literal["greedy", "given"] = "greedy"
    damping: float = 0.01
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.grid not in ("clipped", "range"):
            raise ValueError(f"grid={self.grid!r} must be 'clipped' or 'range'")
        if self.order not in ("greedy", "given"):
            raise ValueError(f"order={self.order!r} must be 'greedy' or 'given'")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; GPTQ's comparison uses 0.01")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """Quantize a weight; the arithmetic is float64 for a float64 weight, else float32.

        Columns whose inputs are all zero are set to zero.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs.

        Returns:
            Packed codes, a scale and a zero point for each channel; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                weight is too large for `scale_dtype`; the damping is too small for these inputs.
        """
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        hessian, dead = layer_hessian("OBQ", weight, inputs, dtype)
        factor = inverse_factor(hessian, dead, self.damping)
        inverse = factor.T @ factor
        rows = weight.to(dtype).masked_fill(dead, 0)
        scale, zero = self._grids(rows)
        grids = (scale[:, None].to(dtype), zero[:, None].to(dtype))
        parts = zip(*(torch.split(part, ROWS) for part in (rows, *grids)), strict=True)
        return QuantizedWeight(
            torch.cat([self._eliminate(w, inverse, step, at) for w, step, at in parts]),
            scale,
            None if self.symmetric else zero,
            bits=self.bits,
            granularity="channel",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
        )

    def _grids(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, `[out]`."""
        if self.grid == "clipped":
            return shrunk_grid(rows, self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)
        low, high = rows.aminmax(dim=1)
        return affine_grid(low, high, self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)

    def _eliminate(self, weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The elimination on some rows at once: codes `[rows, in]`.

        `inverse` is $H^{-1}$ before any step; scale and zero are `[rows, 1]`.
        """
        rows, n = weight.shape
        row, w = torch.arange(rows, device=weight.device), weight
        column = torch.arange(n, device=weight.device).repeat(rows, 1)  # of the weights that are left
        inverses = inverse.expand(rows, n, n)
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for start in range(0, n, STEPS):
            w, diagonal = w.clone(), inverses.diagonal(dim1=1, dim2=2).clone()
            free = torch.ones_like(w, dtype=torch.bool)
            subtracted = w.new_zeros(rows, min(STEPS, n - start), w.shape[1])  # by each step; Lemma 1
            for t in range(subtracted.shape[1]):
                code = (w / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)
                error = w - (code - zero) * scale
                chosen = self._choice(error, diagonal, scale, free)
                codes[row, column[row, chosen]] = code[row, chosen].to(torch.uint8)
                before = subtracted[:, :t]
                current = inverses[row, chosen] - (before[row, :, chosen, None].mT @ before)[:, 0]
                pivot = current[row, chosen, None]
                w -= error[row, chosen, None] / pivot * current
                subtracted[:, t] = current.div_(pivot.sqrt())
                diagonal -= current.square_()
                free[row, chosen] = False
            left = free.nonzero()[:, 1].view(rows, -1)
            w, column = w.gather(1, left), column.gather(1, left)
            at = (row[:, None, None], left[:, :, None], left[:, None])
            lost = subtracted.gather(2, left[:, None].expand(-1, subtracted.shape[1], -1))
            inverses = inverses[at].baddbmm_(lost.mT, lost, alpha=-1)
        return codes

    def _choice(self, error: Tensor, diagonal: Tensor, scale: Tensor, free: Tensor) -> Tensor:
        """Which of the free weights is next in each row, `[rows]`; error, diagonal and free are `[rows, left]`."""
        if self.order == "given":
            return free.cumsum(1).eq_(1).logical_and_(free).nonzero()[:, 1]
        cheapest = (error.square() / diagonal).masked_fill_(~free, torch.inf).argmin(dim=1)
        worst, at = error.abs().mul_(free).max(dim=1)  # pushed off the grid: at once, while others can make up for it
        return torch.where(worst > scale[:, 0] / 2, at, cheapest)
