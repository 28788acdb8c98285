r"""N:M sparsity: keep the N largest of every M neighbouring weights, once, or in every step of a training.

Source: `nm-sparsity` (arXiv 2102.04010), Section 3, for the pattern and for SR-STE, the estimator under which it is trained; official
code NM-sparsity/NM-sparsity@3cebd6be99052ef3e5e216299069d6ca066757d7, devkit/sparse_ops/sparse_ops.py. `sparse-tensor-cores` (arXiv
2104.08378) for pruning a trained network once, and for the storage; official code
NVIDIA/apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d, apex/contrib/sparsity.

Differs from the paper: where M does not divide a row, the row is padded with zeros (apex does so when it looks for a mask, and then
leaves such layers dense; the code of SR-STE cuts the weight into groups across its rows). The weight decay that the paper's
training has besides is the optimizer's.

Not here: training again under the first mask (`sparse-tensor-cores`); permuting channels so that less is lost; kernels
that skip zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from refimpl.compression.protocol import check_layer, matching
from refimpl.compression.pruning.sparse import Pattern, PatternWeight, lowest_of_groups, pattern_of
from refimpl.model.linear import is_transposed


@dataclass(frozen=True, kw_only=True)
class NMSparsity:
    r"""The N:M pattern by magnitude: called on a weight it prunes it once; `attach` has a model train under it.

    Args:
        pattern: `"N:M"`, N of every M neighbours in a row stay.
        decay: $\lambda$ of SR-STE, how fast weights outside the mask shrink in training; 0 is the plain straight-through
            estimator.

    Examples:
        >>> NMSparsity()(torch.tensor([[3.0, -1.0, 2.0, -4.0]])).dense().tolist()
        [[3.0, 0.0, 0.0, -4.0]]

        Train under the pattern, then store it:

        >>> from refimpl.compression.protocol import compress
        >>> model, method = nn.Sequential(nn.Linear(8, 2)), NMSparsity()
        >>> method.attach(model)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
        >>> method.detach(model)
        >>> small = compress(model, method)
        >>> torch.equal(small[0].weight, model[0].weight), int((model[0].weight != 0).sum())
        (True, 8)
    """

    needs_inputs: ClassVar[bool] = False

    pattern: str = "2:4"
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"pattern={self.pattern!r} must be 'N:M', as '2:4'; a share is magnitude's `sparsity`")
        pattern_of(self.pattern)
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay={self.decay} must be 0 or more; the paper uses 2e-4")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> PatternWeight:  # noqa: ARG002 - the protocol passes it
        """Prune a weight once.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            The weights that stay and their places; `dense()` has the weight's dtype.

        Raises:
            ValueError: the weight is no matrix, is empty, or holds NaN or infinity.
        """
        check_layer(weight)
        pattern = self._pattern
        return PatternWeight(weight, ~lowest_of_groups(weight.abs(), pattern), pattern)

    def attach(self, model: nn.Module, target: Sequence[str] = ("*",), skip: Sequence[str] = ("lm_head",)) -> None:
        """Have linear layers multiply by their masked weights, and pass gradients on by `sparse_refined`; in place.

        The dense weights stay the model's parameters, the same objects, so that an optimizer may be made before or after. The
        layers are those that `compress` would take: a tied weight (the output embedding, as a rule) is left alone.

        Args:
            model: any module.
            target: patterns of the whole names of layers, as in a shell.
            skip: patterns of those to leave dense.

        Raises:
            ValueError: as of `compress`: no linear layer's name matches, or one that does is compressed already.
        """
        for layer in matching(model, target, skip).values():
            masked = _Masked(self._pattern, self.decay, transposed=is_transposed(layer))
            parametrize.register_parametrization(layer, "weight", masked)

    def detach(self, model: nn.Module) -> None:
        """Leave the masked weights in place of the dense ones, and the model as it was before `attach` otherwise."""
        for layer in [*model.modules()]:
            if parametrize.is_parametrized(layer, "weight"):
                applied = layer.get_submodule("parametrizations.weight")
                if any(isinstance(part, _Masked) for part in applied.children()):
                    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

    @property
    def _pattern(self) -> Pattern:
        pattern = pattern_of(self.pattern)
        assert pattern is not None
        return pattern


def sparse_refined(weight: Tensor, pattern: Pattern, decay: float = 2e-4) -> Tensor:
    r"""The weight with zeros outside its N:M mask, and for the gradient the sparse-refined straight-through estimator.

    Forward, $\tilde W = m \odot W$, with m the mask of W as it is now. Backward, the gradient of the dense weight is
    $\nabla_{\tilde W} L + \lambda (1 - m) \odot W$: as if no mask were there, plus a pull towards zero on what it hides.

    Args:
        weight: `[out, in]`, finite.
        pattern: N:M.
        decay: $\lambda$.

    Examples:
        >>> weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
        >>> sparse_refined(weight, Pattern(2, 4), decay=0.5).sum().backward()
        >>> weight.grad.tolist()
        [[1.0, 1.0, 2.0, 1.5]]
    """
    kept = ~lowest_of_groups(weight.detach().abs(), pattern)
    masked: Tensor = _SparseRefined.apply(weight, kept, decay)  # type: ignore[no-untyped-call]
    return masked


class _SparseRefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, kept)
        ctx.decay = decay
        return weight * kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, kept = ctx.saved_tensors
        return grad + ctx.decay * (weight * ~kept), None, None


class _Masked(nn.Module):
    """A layer's weight as a function of its dense one."""

    def __init__(self, pattern: Pattern, decay: float, *, transposed: bool) -> None:
        super().__init__()
        self.pattern, self.decay, self.transposed = pattern, decay, transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self.transposed:
            return sparse_refined(weight.T, self.pattern, self.decay).T
        return sparse_refined(weight, self.pattern, self.decay)
