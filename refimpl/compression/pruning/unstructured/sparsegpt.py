r"""SparseGPT: prune a layer column by column, and let the columns still to come make up for what is removed.

Source: `sparsegpt` (arXiv 2301.00774), Section 3 with Algorithm 1, Section 3.3 for patterns; official code
IST-DASLab/sparsegpt@147d2159dc4f3e9f73e47b32c04d7b3708f44436, sparsegpt.py, for damping and dead columns.

Differs from the paper: of each block of columns exactly the share asked for goes, rounded down; the official code removes the next
weight too, and all that equal it. Dead columns do not count in the mean that the damping is a share of (there, each counts as 1).
The official code gathers the inputs of a whole block before it prunes the first of its layers; `compress` lets each layer see what
those before it in the block make once they are pruned. Groups of a pattern whose M does not divide 128 reach over the ends of
blocks of updates; there, each block begins a new group. Where M does not divide a row, the shorter last group loses what it has
beyond N; there, it loses M - N of what it has. N counts the weights that stay, as hardware and the papers on N:M do; in this
paper it counts those that go.

Not here: quantizing what stays in the same pass; convolutions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.hessian import BLOCK, Sweep, inverse_factor, layer_hessian
from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.pruning.sparse import Pattern, lowest, lowest_of_groups, pattern_of, sparse_form


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    r"""One-shot pruning with second-order error compensation.

    Args:
        sparsity: share of the weights removed, 0 to below 1, in each block of `mask_block` columns; or a pattern, `"2:4"`: two
            of every four neighbours in a row stay.
        mask_block: columns whose weights are compared at once, with all rows', when the sweep comes to the first of them ($B_s$
            of Algorithm 1); a pattern has blocks of its own width.
        damping: share of the mean of $H$'s diagonal that is added to it, 0 or more.

    Examples:
        Two inputs that are nearly equal: the second weight takes over what the first one did.

        >>> weight, inputs = torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 8.0], [8.0, 8.0], [0.0, 1.0]])
        >>> [round(w, 1) for w in SparseGPT(damping=0.0)(weight, inputs).dense()[0].tolist()]
        [0.0, 3.0]
    """

    sparsity: float | str = 0.5
    mask_block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        pattern_of(self.sparsity)
        if self.mask_block < 1:
            raise ValueError(f"mask_block={self.mask_block} must be at least 1; the paper uses 128")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; the official code uses 0.01")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Prune a weight; the arithmetic is float32, or float64 for a weight in it.

        Columns whose inputs are all zero are set to zero.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs; more rows than `in`; the paper takes 128 texts of 2048 tokens.

        Returns:
            The weights that stay, corrected, and their places; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                damping is too small for these inputs.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        hessian, dead = layer_hessian("SparseGPT", weight, inputs, dtype)
        columns = weight.to(dtype).T.clone(memory_format=torch.contiguous_format).masked_fill_(dead[:, None], 0)
        removed = self._prune_(columns, inverse_factor(hessian, dead, self.damping))
        return sparse_form(columns.T.to(weight.dtype), ~removed.T, pattern_of(self.sparsity))

    def _prune_(self, columns: Tensor, factor: Tensor, block: int = BLOCK) -> Tensor:
        """Algorithm 1: mask of the weights that are removed, `[in, out]`.

        Args:
            columns: `[in, out]`; pruned and corrected in place.
            factor: $U$, upper triangular, with $(H + λI)^{-1} = U^T U$.
            block: columns in a block of updates (B); no result depends on it but for rounding.
        """
        pattern = pattern_of(self.sparsity)
        size = pattern.of if pattern else self.mask_block
        removed = torch.zeros_like(columns, dtype=torch.bool)
        for i, sweep in enumerate(Sweep(columns, factor, block)):
            if i % size == 0:
                group = slice(i, i + size)
                saliency = sweep.current(group).div_(factor.diagonal()[group, None]).square_()
                removed[group] = self._least(saliency.T, pattern).T
            sweep.settle(sweep.column.masked_fill(removed[i], 0))
        return removed

    def _least(self, saliency: Tensor, pattern: Pattern | None) -> Tensor:
        """Which of a block's weights go, `[out, size]`: the least salient of all, or of each row in a pattern."""
        if pattern:
            return lowest_of_groups(saliency, pattern)
        return lowest(saliency.flatten(), int(saliency.numel() * float(self.sparsity))).view(saliency.shape)
