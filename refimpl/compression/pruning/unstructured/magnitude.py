r"""Magnitude pruning: remove the smallest weights of a layer.

Source: `magnitude-pruning` (arXiv 1506.02626), Section 3, for the rule, all weights below a threshold go; in one shot and with
the threshold that gives every layer the same sparsity it is the baseline of `sparsegpt` (arXiv 2301.00774), Section 4, and of
`wanda` (arXiv 2306.11695), Section 4; official code locuslab/wanda@8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6, lib/prune.py.

Differs from the paper: the threshold follows from the sparsity, where the first paper takes a multiple of the standard deviation of
the layer's weights, chosen by hand. Exactly the share asked for goes, rounded down; the official code removes the next weight
too, and all that equal it.

Not here: training after pruning; one threshold for all layers of a model; the patterns of `n_m_sparsity`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from refimpl.compression.protocol import check_layer
from refimpl.compression.pruning.sparse import SparseWeight, lowest, pattern_of


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    r"""Removal of the smallest weights, without data.

    Of all ways to remove as many weights of a comparison group, it is the one with the least $\|W - \hat W\|_F$.

    Args:
        sparsity: share of the weights removed, 0 to below 1.
        compare: which weights are compared: those of the whole layer, or of each row, so that each output loses the same
            share (`wanda`, Section 3).

    Examples:
        >>> weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
        >>> Magnitude(sparsity=0.5)(weight).dense().tolist()
        [[0.0, 0.0], [3.0, -4.0]]
        >>> Magnitude(sparsity=0.5, compare="row")(weight).dense().tolist()
        [[0.0, -2.0], [0.0, -4.0]]
    """

    needs_inputs: ClassVar[bool] = False

    sparsity: float = 0.5
    compare: Literal["layer", "row"] = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, str):
            raise ValueError(f"sparsity={self.sparsity!r} must be a share of the weights; patterns are n-m-sparsity's")
        pattern_of(self.sparsity)
        if self.compare not in ("layer", "row"):
            raise ValueError(f"compare={self.compare!r} must be 'layer' or 'row'")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> SparseWeight:  # noqa: ARG002 - the protocol passes it
        """Prune a weight.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            The weights that stay and their places; `dense()` has the weight's dtype.

        Raises:
            ValueError: the weight is no matrix, is empty, or holds NaN or infinity.
        """
        check_layer(weight)
        compared = weight.abs().reshape(1, -1) if self.compare == "layer" else weight.abs()
        removed = lowest(compared, int(compared.shape[1] * self.sparsity))
        return SparseWeight(weight, ~removed.view(weight.shape))
