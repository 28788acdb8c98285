r"""Rounding that gradients pass, and ranges of a weight's grids that are learned.

A weight's group with least value $a$ and greatest $b$ is quantized on the grid of $[\sigma(\beta) a, \sigma(\gamma) b]$, where
$\beta$ and $\gamma$ are learned and $\sigma$ is the sigmoid. Rounding counts as the identity in gradients; the zero point, which is
rounded too, as a constant.

Source: `omniquant` (arXiv 2308.13137), Eq. (2), learnable weight clipping; official code
OpenGVLab/OmniQuant@95fae1bd00eaa60d03a20eb39c76c4cb173f51f7, quantize/quantizer.py.

Differs from the paper: a range contains 0, as those of `affine` do, so that the zero point is a code. Steps are rounded up to the
type that they are stored in, while they are learned too.

Not here: symmetric grids.
"""

import torch
from torch import Tensor, nn

from refimpl.compression.quantization.activations import Activations, IntegerWeight
from refimpl.compression.quantization.affine import Granularity, affine_grid, from_groups, quantize, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight

STRENGTH = 4.0  # of the clipping before the sigmoid, where learning begins: 0.982 of the range


def rounded(groups: Tensor, low: Tensor, high: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    r"""Values of `[groups, size]` on the grids of ranges, with gradients to all three.

    Args:
        groups: what is rounded.
        low: `[groups]`, least value that a grid covers.
        high: `[groups]`, greatest.
        bits: 1 to 8.
        scale_dtype: what steps are rounded up to.

    Examples:
        Two bits over [0, 3]. What lies inside has gradient 1; a value beyond follows the range: d 3 s / d high = 1.

        >>> x, high = torch.tensor([[0.4, 1.7, 5.0]], requires_grad=True), torch.tensor([3.0], requires_grad=True)
        >>> y = rounded(x, torch.zeros(1), high, 2, torch.float32)
        >>> torch.autograd.backward(y[0, [0, 2]].sum())
        >>> y.tolist(), x.grad.tolist(), round(high.grad.item(), 4)  # (0 - 0.4) / 3 + 1
        ([[0.0, 2.0, 3.0]], [[1.0, 0.0, 0.0]], 0.8667)
    """
    scale, zero = affine_grid(low.detach(), high.detach(), bits, symmetric=False, scale_dtype=scale_dtype)
    exact = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
    step = (exact + (scale.float() - exact).detach())[:, None]
    codes = groups / step
    codes = codes + (codes.round() - codes).detach() + zero[:, None]
    values: Tensor = (codes.clamp(0, 2**bits - 1) - zero[:, None]) * step
    return values


class LearnedClipping(nn.Module):
    r"""The ranges of one weight's grids.

    Args:
        shape: `(out, in)` of the weight.
        bits: 1 to 8.
        group_size: neighbours in a channel that share a grid; None is the whole channel.
        strength: of the clipping at first, before the sigmoid; infinity clips nothing.
        scale_dtype: what steps are stored in.

    Examples:
        >>> clipping = LearnedClipping((1, 4), bits=2, strength=float("inf"))
        >>> clipping(torch.tensor([[0.0, 1.0, 2.0, 3.0]])).tolist()
        [[0.0, 1.0, 2.0, 3.0]]
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group_size: int | None = None,
        *,
        strength: float = STRENGTH,
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.scale_dtype = shape, bits, scale_dtype
        self.granularity: Granularity = "channel" if group_size is None else "group"
        self.group_size = group_size or shape[1]
        groups = shape[0] * -(-shape[1] // self.group_size)
        self.upper = nn.Parameter(torch.full((groups,), strength))
        self.lower = nn.Parameter(torch.full((groups,), strength))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight `[out, in]` as it will be read, with gradients."""
        return from_groups(rounded(*self.ranges(weight), self.bits, self.scale_dtype), self.shape)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight's groups, and the least and the greatest value that their grids cover."""
        groups = to_groups(weight, self.granularity, self.group_size)
        return groups, torch.sigmoid(self.lower) * groups.amin(dim=1), torch.sigmoid(self.upper) * groups.amax(dim=1)

    @torch.no_grad()
    def held(self, weight: Tensor, dtype: torch.dtype, activations: Activations | None = None) -> QuantizedWeight:
        """The weight as packed integers, for inputs that are quantized where `activations` says how; `dense()` has the dtype."""
        groups, low, high = self.ranges(weight)
        scale, zero = affine_grid(low, high, self.bits, symmetric=False, scale_dtype=self.scale_dtype)
        codes = quantize(groups, scale, zero, self.bits)
        if activations is None:
            return QuantizedWeight(
                codes, scale, zero, bits=self.bits, granularity=self.granularity, shape=self.shape, dtype=dtype
            )
        return IntegerWeight(
            codes,
            scale,
            zero,
            bits=self.bits,
            granularity=self.granularity,
            shape=self.shape,
            dtype=dtype,
            activations=activations,
        )
