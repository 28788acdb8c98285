r"""Factors of a layer's input channels and limits of its weights, chosen by the activations that meet them.

Weights of an input channel are multiplied by a factor and its activations divided by it, so that rounding errors of channels with
large activations weigh less; then each group of weights is clamped where that costs the output least.

Source: `awq` (arXiv 2306.00978), Section 3.2, Eq. (4) and (5); official code
mit-han-lab/llm-awq@d6e797a42b9ef7778de8ee2352116e0f48a78d61, awq/quantize/auto_scale.py (`_search_module_scale`) and auto_clip.py
(`auto_clip_layer`), whose constants these are.

Differs from the paper: a group's share of the output error is computed from its inputs' second moments, to the same sum. Of
fewer than 512 tokens all are looked at; the official code refuses them.

Not here: what precedes the layer, and layers that share an input: see `weight_only/awq.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.hessian import gram
from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import affine_grid, from_groups, nearest, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight

EXPONENTS = 20  # that are tried: 0, 0.05, up to 0.95
LIMITS, LEAST = 20, 0.5  # a group's largest weight is lowered by twentieths, to above a half
TOKENS = 512  # that limits are judged on


def factors(mean: Tensor, exponent: float) -> Tensor:
    r"""$s = s_X^\alpha$, over the geometric mean of its largest and its smallest, `[in]`, float32 (Eq. 5).

    Args:
        mean: $s_X$, `[in]`, mean magnitude of each input.
        exponent: $\alpha$, 0 to 1.

    Examples:
        >>> factors(torch.tensor([16.0, 4.0, 1.0]), 0.5).tolist()
        [2.0, 1.0, 0.5]
    """
    scale = mean.float().pow(exponent).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def best_factors(mean: Tensor, error: Callable[[Tensor], float]) -> Tensor:
    """The factors of least error among the exponents 0, 0.05, up to 0.95; of equals, the least exponent.

    Args:
        mean: as in `factors`.
        error: of the factors.

    Examples:
        >>> best_factors(torch.tensor([16.0, 4.0, 1.0]), lambda factor: abs(float(factor.max()) - 2)).tolist()
        [2.0, 1.0, 0.5]
    """
    return min((factors(mean, i / EXPONENTS) for i in range(EXPONENTS)), key=error)


def output_error(weight: Tensor, inputs: Tensor, rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    r"""$\|Q(W \operatorname{diag}(s)) \operatorname{diag}(s)^{-1} X - W X\|^2$ as a function of the factors s (Eq. 4).

    Args:
        weight: `[out, in]`.
        inputs: `[n, in]`.
        rounded: Q, of a weight.

    Examples:
        >>> error = output_error(torch.tensor([[0.4, 1.0]]), torch.tensor([[3.0, 0.0]]), torch.round)
        >>> error(torch.ones(2)), error(torch.tensor([2.5, 1.0]))
        (1.440000057220459, 0.0)
    """
    weight, moments = weight.float(), gram(inputs)

    def error(factor: Tensor) -> float:
        moved = rounded(weight * factor) / factor - weight
        return float(((moved @ moments) * moved).sum())

    return error


def clipped(
    weight: Tensor, inputs: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> Tensor:
    """The weight, each group clamped to the limit with which its share of the output errs least.

    Args:
        weight: `[out, in]`; left unchanged.
        inputs: `[n, in]`, of which every `n // 512`-th is looked at.
        bits: of the grid.
        group_size: neighbours in a channel that share a grid.
        scale_dtype: what scales are stored in.

    Returns:
        `[out, in]`, in the weight's dtype.

    Examples:
        The first weight meets no input: it makes way for the second.

        >>> clipped(torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]), 1, 3)
        tensor([[1.9500, 1.9500, 0.0000]])
    """
    groups = to_groups(weight.float(), "group", group_size).view(len(weight), -1, group_size).transpose(0, 1)
    seen = inputs[:: max(1, len(inputs) // TOKENS)].float()
    seen = F.pad(seen, (0, -seen.shape[1] % group_size)).view(len(seen), -1, group_size).transpose(0, 1)
    moments = seen.transpose(1, 2) @ seen  # [groups of a channel, size, size]
    largest = groups.abs().amax(dim=2, keepdim=True)
    best, least = largest, torch.full_like(largest, torch.inf)
    for i in range(round(LIMITS * LEAST)):
        limit = largest * (1 - i / LIMITS)
        kept = groups.clamp(-limit, limit)
        moved = _on_grid(kept.flatten(0, 1), bits, scale_dtype).view_as(kept) - groups
        error = ((moved @ moments) * moved).sum(dim=2, keepdim=True)
        best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
    found = groups.clamp(-best, best).transpose(0, 1).reshape(-1, group_size)
    return from_groups(found, (weight.shape[0], weight.shape[1])).to(weight.dtype)


def on_grids(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> Tensor:
    """A weight `[out, in]` on the grids of its groups' ranges, float32, as `rtn` leaves it."""
    groups = _on_grid(to_groups(weight, "group", group_size), bits, scale_dtype)
    return from_groups(groups, (weight.shape[0], weight.shape[1]))


def _on_grid(groups: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    low, high = groups.aminmax(dim=1)
    scale, zero = affine_grid(low, high, bits, symmetric=False, scale_dtype=scale_dtype)
    return nearest(groups, scale, zero, bits)


class ScaledWeight(CompressedWeight):
    r"""A quantized weight whose inputs are divided first: $\hat W = Q(W \operatorname{diag}(s)) \operatorname{diag}(s)^{-1}$.

    Args:
        low: $Q(W \operatorname{diag}(s))$.
        factor: s, `[in]`, stored as it is.
    """

    factor: Tensor

    def __init__(self, low: QuantizedWeight, factor: Tensor) -> None:
        super().__init__()
        self.low = low
        self.register_buffer("factor", factor)

    def dense(self) -> Tensor:
        r"""$\hat W$, `[out, in]`."""
        return (self.low.dense().float() / self.factor.float()).to(self.low.dtype)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.low.multiply((inputs / self.factor.float()).to(inputs.dtype), bias)


def half(weight: Tensor) -> torch.dtype:
    """What factors of a weight are stored in: its own type if that is bfloat16, else float16."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
