r"""Affine quantization of groups of numbers, as all integer quantizers here use it.

    q = clamp(round(x / scale) + zero, 0, 2^bits - 1)        x' = (q - zero) * scale

A *group* is a row of a matrix `[groups, size]`; each has one scale (positive) and one integer zero point. The range of a
group always contains 0, so that 0 is a level, as padding and pruned weights need it.
"""

from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel", "group"]


def to_groups(weight: Tensor, granularity: Granularity, group_size: int) -> Tensor:
    """The weight `[out, in]` as `[groups, size]`: one group, one per output channel, or `in / group_size` per channel.

    Where `group_size` does not divide `in`, a channel's last group is shorter: it is filled up with its own last value,
    which changes neither its least nor its greatest, and `from_groups` cuts that off again.
    """
    if granularity == "tensor":
        return weight.reshape(1, -1)
    if granularity == "channel":
        return weight
    missing = -weight.shape[1] % group_size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    return weight.reshape(-1, group_size)


def from_groups(groups: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `to_groups`: back to `[out, in]`."""
    return groups.reshape(shape[0], -1)[:, : shape[1]]


def affine_grid(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid of `2^bits` levels that covers a range.

    Args:
        low: `[groups]`, least value of each group.
        high: `[groups]`, greatest value.
        bits: 1 to 8.
        symmetric: cover [-m, m] with m = max(-low, high), and put the zero point in the middle.
        scale_dtype: what scales are stored in. They are rounded *up* to it, so that the grid still covers the range.

    Returns:
        scale `[groups]`, in `scale_dtype`, positive; zero `[groups]`, float32 holding integers.

    Raises:
        ValueError: a range is wider than `scale_dtype` can express.
    """
    steps = 2**bits - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = _round_up((high - low) / steps, scale_dtype)
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"a range of {float((high - low).max()):g} needs a scale beyond {scale_dtype}; use scale_dtype=torch.float32"
        )
    zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale.float()).clamp(0, steps)
    return scale, zero


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast positive float32 to a dtype, never below the value; a scale of 0 (a group of zeros) becomes the smallest normal."""
    cast = scale.to(dtype)
    if dtype != torch.float32:
        bits_as_int = cast.view(torch.int16)
        cast = torch.where(cast.float() < scale, bits_as_int + 1, bits_as_int).view(dtype)
    return cast.clamp(min=torch.finfo(dtype).tiny)


def quantize(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of `[groups, size]` on each group's grid, uint8."""
    codes = (groups.float() / scale.float()[:, None]).round_().add_(zero[:, None])
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def nearest(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The levels of each group's grid that are nearest to `[groups, size]`, float32: `dequantize` of `quantize`."""
    step, zero = scale.float()[:, None], zero[:, None]
    return (groups.float() / step).round_().clamp_(-zero, 2**bits - 1 - zero).mul_(step)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of codes `[groups, size]`, float32."""
    values = codes.to(torch.float32, copy=True)
    return values.sub_(zero.float()[:, None]).mul_(scale.float()[:, None])
