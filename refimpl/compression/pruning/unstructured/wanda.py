r"""Wanda: remove the weights of each output whose size times the norm of their input is least.

Source: `wanda` (arXiv 2306.11695), Section 3 with Eq. (1) and Algorithm 1; official code
locuslab/wanda@8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6, lib/prune.py and lib/layerwrapper.py.

Differs from the paper: none. The official code divides the squared norms by the number of calibration texts, which is the same for all
inputs of a layer and changes no order. It gathers the inputs of a whole block before it prunes the first of its layers; `compress`
lets each layer see what those before it in the block make once they are pruned. Where M does not divide a row, the shorter last
group of a pattern loses what it has beyond N; there, it loses M - N of what it has.

Not here: the variant that lets the share differ between rows; training after pruning.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight, check_layer
from refimpl.compression.pruning.sparse import lowest, lowest_of_groups, pattern_of, sparse_form


@dataclass(frozen=True, kw_only=True)
class Wanda:
    r"""Pruning by weights and activations, $S_{ij} = |W_{ij}| \cdot \|X_j\|_2$ (Eq. 1), without a change to what stays.

    Args:
        sparsity: share of every row's weights that is removed, 0 to below 1, rounded down; or a pattern, `"2:4"`: two of every
            four neighbours in a row stay.

    Examples:
        The second input is ten times the others, and so its weight stays, small as it is:

        >>> weight, inputs = torch.tensor([[3.0, 1.0, 2.0, -4.0]]), torch.tensor([[1.0, 10.0, 1.0, -1.0]])
        >>> Wanda(sparsity=0.5)(weight, inputs).dense().tolist()
        [[0.0, 1.0, 0.0, -4.0]]
    """

    sparsity: float | str = 0.5

    def __post_init__(self) -> None:
        pattern_of(self.sparsity)

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Prune a weight; scores are float32, or float64 for a weight in it.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs; the authors take 128 texts.

        Returns:
            The weights that stay and their places; `dense()` has the weight's dtype.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity.
        """
        if inputs is None:
            raise ValueError("Wanda needs the layer's inputs: pass `inputs`, or `calibration` to `compress`")
        check_layer(weight, inputs)
        scores = wanda_scores(weight, inputs)
        pattern = pattern_of(self.sparsity)
        if pattern is None:
            removed = lowest(scores, int(weight.shape[1] * float(self.sparsity)))
        else:
            removed = lowest_of_groups(scores, pattern)
        return sparse_form(weight, ~removed, pattern)


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    r"""$S_{ij} = |W_{ij}| \cdot \|X_j\|_2$ (Eq. 1), `[out, in]`, float32, or float64 for a weight in it.

    Its square is what the layer's squared output error grows by, if this weight alone is removed.

    Raises:
        ValueError: the inputs are all zero.

    Examples:
        >>> wanda_scores(torch.tensor([[-2.0, 1.0]]), torch.tensor([[3.0, 0.0], [4.0, 1.0]])).tolist()
        [[10.0, 1.0]]
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(inputs, dim=0, dtype=dtype)
    if not norms.any():
        raise ValueError("inputs are all zero: nothing can be calibrated on them")
    return weight.abs().to(dtype).mul_(norms)
