r"""Asymmetric quantization of groups of numbers, as the caches use it: a scale and a minimum of 16 bits for each group.

    q = round((x - minimum) / scale),  0 to 2^bits - 1        x' = q * scale + minimum

Scale and minimum are rounded *outward* to their 16 bits, so that the levels cover the group and nothing moves by more than scale / 2.
"""

import torch
from torch import Tensor


def quantize(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Codes and grid of each group, $s = (\max x - \min x) / (2^{bits} - 1)$; computed in float32 or above.

    Args:
        x: any shape, finite; what lies along `dim` is a group.
        dim: which.
        bits: 1 to 8.

    Returns:
        Codes of x's shape, uint8; scale and minimum, 1 along `dim`, in x's dtype if it has 16 bits, otherwise in float16.

    Raises:
        ValueError: a value is beyond what the 16 bits express, or not finite.

    Examples:
        >>> codes, scale, minimum = quantize(torch.tensor([-1.0, 0.4, 1.6, 2.0]), 0, 2)
        >>> codes.tolist(), scale.tolist(), minimum.tolist()
        ([0, 1, 3, 3], [1.0], [-1.0])
    """
    stored = halved(x.dtype)
    x = x if x.dtype == torch.float64 else x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    minimum = -_rounded_up(-low, stored)
    scale = _rounded_up((high - minimum.to(x.dtype)) / (2**bits - 1), stored).clamp(min=torch.finfo(stored).tiny)
    if not bool(torch.isfinite(scale).all() & torch.isfinite(minimum).all()):
        raise ValueError(
            f"values up to {float(x.abs().max()):g} do not fit a grid in {stored}; move the model to bfloat16"
        )
    codes = ((x - minimum.to(x.dtype)) / scale.to(x.dtype)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor, out: Tensor) -> Tensor:
    """Values of codes, written to `out`, whose dtype they are computed in.

    Args:
        codes: uint8, any shape.
        scale: as `quantize` gives it.
        minimum: the same.
        out: of the codes' shape, any floating dtype.
    """
    return out.copy_(codes).mul_(scale.to(out.dtype)).add_(minimum.to(out.dtype))


def halved(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself if it has 16 bits, otherwise float16."""
    return dtype if dtype.itemsize == 2 else torch.float16


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to 16 bits, never below the value."""
    cast = x.to(dtype)
    return torch.where(cast.to(x.dtype) < x, cast.nextafter(torch.full_like(cast, float("inf"))), cast)
