r"""Codes in tiny groups whose scales and zero points are quantized too, with outliers beside them.

    w = (q - z) s      s = least + step * code      z likewise

Sixteen weights share s and z; the scales that sixteen output channels have for the same columns share `step` and `least`, and so
do their zero points.

Source: `spqr` (arXiv 2306.03078), Section 4.2; official code Vahe1994/SpQR@543d10e56f921e5eeb10d5f0aaaccd30b6662d0e,
quant_groups.py.

Differs from the paper: a second-level grid is stored as its step and its least value instead of step and zero point: the same map,
but the zero point overflows 16 bits where the scales of a group hardly differ.

Not here: how groups are fitted and outliers chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import from_groups, to_groups
from refimpl.compression.quantization.outliers import Outliers
from refimpl.model.bits import pack, unpack

ROWS = 16  # output channels that share a second-level grid


@dataclass(frozen=True)
class Statistics:
    """Scales or zero points, quantized: codes `[groups, out]`, and step and least value `[groups, out / 16]`, float16."""

    codes: Tensor
    step: Tensor
    least: Tensor
    bits: int

    @classmethod
    def of(cls, values: Tensor, bits: int) -> "Statistics":
        """Those of one group of columns, `[out]`."""
        low, high = to_groups(values[None], "group", ROWS).aminmax(dim=1)
        step, least = ((high - low) / (2**bits - 1)).half(), low.half()
        if not torch.isfinite(torch.cat([step, least])).all():
            raise ValueError(f"a scale of {float(values.max()):g} is beyond torch.float16; rescale the weight")
        step_each, least_each = (x.float().repeat_interleave(ROWS)[: len(values)] for x in (step, least))
        code = torch.where(step_each > 0, (values - least_each) / step_each, 0).round_().clamp_(0, 2**bits - 1)
        return cls(code.to(torch.uint8)[None], step[None], least[None], bits)

    @classmethod
    def stack(cls, parts: tuple["Statistics", ...]) -> "Statistics":
        """Those of all groups."""
        codes, step, least = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "step", "least"))
        return cls(codes, step, least, parts[0].bits)

    def values(self) -> Tensor:
        """Scales or zero points, `[groups, out]`, float32; `[out]` of a single group."""
        n = self.codes.shape[1]
        step, least = (x.float().repeat_interleave(ROWS, dim=1)[:, :n] for x in (self.step, self.least))
        return (self.codes * step + least).squeeze(0) if len(self.codes) == 1 else self.codes * step + least


class BilevelWeight(CompressedWeight):
    """Codes in tiny groups with quantized statistics, and outliers that stand instead of their codes.

    Args:
        codes: `[out, in]`, uint8, in the order of visits.
        scales: of the groups.
        zeros: their zero points.
        outliers: with their places in the weight.
        order: `[in]`, the column at each place of the codes; None is the weight's own.
        bits: of a weight's code.
        group_size: neighbours in a channel that share a scale and a zero point.
        dtype: of the dense weight.
    """

    codes: Tensor
    order: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scales: Statistics,
        zeros: Statistics,
        outliers: Outliers,
        order: Tensor | None,
        *,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.dtype = (codes.shape[0], codes.shape[1]), dtype
        self.bits, self.statistics_bits, self.group_size = bits, scales.bits, group_size
        self.register_buffer("codes", pack(codes.flatten(), bits))
        for name, of in (("scales", scales), ("zeros", zeros)):
            self.register_buffer(name, pack(of.codes.flatten(), of.bits))
            self.register_buffer(f"{name}_step", of.step)
            self.register_buffer(f"{name}_least", of.least)
        index = torch.int16 if codes.shape[1] <= 2**15 else torch.int32
        self.register_buffer("order", None if order is None else order.to(index))
        self.outliers = outliers

    def dense(self) -> Tensor:
        r"""$\hat W + S$, `[out, in]`."""
        out, n = self.shape
        codes = to_groups(unpack(self.codes, self.bits, out * n).view(out, n), "group", self.group_size)
        scale, zero = (self._statistics(name).T.reshape(-1, 1) for name in ("scales", "zeros"))
        dense = from_groups((codes - zero) * scale, self.shape)
        if self.order is not None:
            dense = dense[:, self.order.argsort()]
        return self.outliers.put(dense.to(self.dtype))

    def _statistics(self, name: str) -> Tensor:
        """Scales or zero points, `[groups, out]`."""
        groups, bits = -(-self.shape[1] // self.group_size), self.statistics_bits
        codes = unpack(getattr(self, name), bits, groups * self.shape[0]).view(groups, -1)
        values = Statistics(codes, getattr(self, f"{name}_step"), getattr(self, f"{name}_least"), bits).values()
        return values.view(groups, -1)
