r"""Quantized activations, and weights of integers that are multiplied with them in integers.

Two grids: the *symmetric* one has the codes $-m, \dots, m$ with $m = 2^{bits-1} - 1$ and the step $\max|x| / m$; the
*asymmetric* one is that of `affine`, with $2^{bits}$ levels from the least value to the greatest, 0 among them. What shares a
grid is a token's row, or all inputs of a call, both found at run time; or it is fixed once for all calls, from calibration data.

Source: the symmetric grid is `llm-int8` (arXiv 2208.07339), Section 2.1, absmax quantization, the asymmetric one Eq. (1) of
`integer-arithmetic-inference-2018` (arXiv 1712.05877); per token, per tensor, static and dynamic are told apart in
`smoothquant` (arXiv 2211.10438), Section 2 with Fig. 3.

Differs from the paper: integers are multiplied as float32 numbers that hold integers, in runs of columns whose sums stay below
$2^{24}$, where float32 is exact; the result is that of integer kernels.

Not here: integer kernels; grids for channels or clusters of channels of the inputs; gradients.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.quantization.affine import Granularity, affine_grid, from_groups, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.model.bits import unpack

Scope = Literal["token", "tensor", "static"]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How a layer's inputs are quantized.

    Args:
        bits: 2 to 8.
        scope: what shares a grid: a token's row (`token`), all inputs of a call (`tensor`), all calls (`static`).
        symmetric: the grid is centred on 0; otherwise it spans the values from the least to the greatest.
        clip: the grid covers this share of the range, above 0 and up to 1; what is beyond gets the outermost level.

    Examples:
        >>> codes, scale = Activations(bits=4).quantize(torch.tensor([[7.0, -3.4, 0.6], [70.0, -34.0, 0.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[7.0, -3.0, 1.0], [7.0, -3.0, 0.0]], [[1.0], [10.0]])
    """

    bits: int = 8
    scope: Scope = "token"
    symmetric: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} of activations must be 2 to 8")
        if self.scope not in ("token", "tensor", "static"):
            raise ValueError(f"scope={self.scope!r} must be 'token', 'tensor' or 'static'")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} must be above 0 and at most 1, where nothing is clipped")

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of ranges, both in float32 and in the shape of `low`; the zero point holds integers."""
        low, high = self.clip * low.float(), self.clip * high.float()
        if self.symmetric:
            return absmax_scale(torch.maximum(-low, high), self.bits), torch.zeros_like(low)
        scale, zero = affine_grid(low.flatten(), high.flatten(), self.bits, symmetric=False, scale_dtype=torch.float32)
        return scale.view_as(low), zero.view_as(low)

    def quantize(self, inputs: Tensor, grid: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Integers, and the scale that they count in.

        Args:
            inputs: `[..., in]`; of `scope="tensor"` the whole tensor shares a grid.
            grid: scale and zero point of a static grid; None, where it is found in the inputs.

        Returns:
            Codes less the zero point, shaped as the inputs, float32 holding integers; scale, float32, that broadcasts to them.

        Raises:
            ValueError: a static grid is missing.
        """
        if self.scope == "static" and grid is None:
            raise ValueError("scope='static' needs the grid that calibration found: pass `grid`, or take another scope")
        scale, zero = grid if grid is not None else self.grid(*self._range(inputs))
        codes = (inputs.float() / scale).round_().add_(zero)
        least, greatest = (
            (-(2 ** (self.bits - 1)) + 1, 2 ** (self.bits - 1) - 1) if self.symmetric else (0, 2**self.bits - 1)
        )
        return codes.clamp_(least, greatest).sub_(zero), scale

    def _range(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each token, `[..., 1]`, or of all of them."""
        if self.scope == "token" or not inputs.numel():
            return inputs.amin(dim=-1, keepdim=True), inputs.amax(dim=-1, keepdim=True)
        return inputs.amin(), inputs.amax()


def absmax_scale(largest: Tensor, bits: int) -> Tensor:
    """Step of the symmetric grid whose outermost level is the largest magnitude; a row of zeros gets the smallest float."""
    return (largest.float() / float(2 ** (bits - 1) - 1)).clamp(min=torch.finfo(torch.float32).tiny)


def absmax_round(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row of `[groups, size]` to its symmetric grid: integers in float32, and scales `[groups]`.

    Examples:
        >>> absmax_round(torch.tensor([[3.0, -1.4], [0.0, 0.0]]), 3)[0].tolist()
        [[3.0, -1.0], [0.0, 0.0]]
    """
    scale = absmax_scale(groups.abs().amax(dim=1), bits)
    return (groups.float() / scale[:, None]).round_(), scale


def exact_product(x: Tensor, w: Tensor, bits: int) -> Tensor:
    r"""$x w^\top$ of integers in float32, as integer arithmetic gives it, in float32 (float64 where it may exceed $2^{24}$).

    Args:
        x: `[n, in]`, integers.
        w: `[out, in]`, integers.
        bits: together of x and w: no product of theirs reaches `2^bits`, which is at most `2^24`.
    """
    columns = 2 ** (24 - bits)
    if x.shape[1] <= columns:
        return F.linear(x, w)
    parts = zip(torch.split(x, columns, dim=1), torch.split(w, columns, dim=1), strict=True)
    return torch.stack([F.linear(a, b).double() for a, b in parts]).sum(dim=0)


class IntegerWeight(QuantizedWeight):
    """Packed codes of a weight, whose inputs are quantized too: `multiply` is a product of integers, scaled afterwards.

    Groups inside of a channel make a product each, since their scales stand inside of the sum.

    Args:
        codes: as in `QuantizedWeight`.
        scale: as in `QuantizedWeight`.
        zero: as in `QuantizedWeight`.
        bits: 1 to 8, of the weight.
        granularity: as in `QuantizedWeight`.
        shape: `(out, in)` of the weight.
        dtype: of the dense weight.
        activations: how inputs are quantized.
        reach: of `scope="static"`, the least and the greatest input of the calibration data, scalars.

    Raises:
        ValueError: the reach is missing where the scope is static, or given where it is not.

    Examples:
        >>> held = integer_weight(torch.tensor([[127.0, -2.0]]), Activations())
        >>> held.read(torch.tensor([254.0, 3.0])).tolist(), held.multiply(torch.tensor([254.0, 3.0])).tolist()
        ([254.0, 4.0], [32250.0])
    """

    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        granularity: Granularity,
        shape: tuple[int, int],
        dtype: torch.dtype,
        activations: Activations,
        reach: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(codes, scale, zero, bits=bits, granularity=granularity, shape=shape, dtype=dtype)
        if (activations.scope == "static") != (reach is not None):
            raise ValueError(f"scope={activations.scope!r}: `reach` is for a static scope, which needs it")
        self.input_bits, self.input_scope = activations.bits, activations.scope
        self.input_symmetric, self.input_clip = activations.symmetric, activations.clip
        grid = (None, None) if reach is None else activations.grid(*reach)
        self.register_buffer("input_scale", grid[0])
        self.register_buffer("input_zero", None if activations.symmetric else grid[1])

    @property
    def activations(self) -> Activations:
        """How inputs are quantized."""
        return Activations(
            bits=self.input_bits, scope=self.input_scope, symmetric=self.input_symmetric, clip=self.input_clip
        )

    def quantize_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Integers for the inputs `[..., in]`, and the scale that they count in, both float32."""
        if self.input_scale is None:
            return self.activations.quantize(inputs)
        zero = torch.zeros_like(self.input_scale) if self.input_zero is None else self.input_zero
        return self.activations.quantize(inputs, (self.input_scale, zero))

    def integers(self) -> Tensor:
        """The weight's codes less their zero points, `[out, in]`, float32 holding integers."""
        rows, columns = self.shape
        groups = to_groups(
            unpack(self.codes, self.bits, rows * columns).view(rows, columns), self.granularity, self.group_size
        )
        if self.zero is None:
            return from_groups(groups.float() - 2 ** (self.bits - 1), self.shape)
        zero = unpack(self.zero, self.bits, self.scale.numel())
        return from_groups(groups.float() - zero.float()[:, None], self.shape)

    def product(self, codes: Tensor) -> Tensor:
        """Integers `[n, in]` times the weight, `[n, out]`: exact sums of integers, times the weight's scales."""
        w, scale, bits = self.integers(), self.scale.float(), self.bits + self.input_bits
        if self.granularity != "group":
            return (exact_product(codes, w, bits) * scale).float()
        total = codes.new_zeros(len(codes), len(w))
        pairs = zip(torch.split(codes, self.group_size, 1), torch.split(w, self.group_size, 1), strict=True)
        for (x, part), step in zip(pairs, scale.view(len(w), -1).T, strict=True):
            total += exact_product(x, part, bits) * step
        return total

    def read(self, inputs: Tensor) -> Tensor:
        """The quantized inputs' values, `[..., in]`, in the inputs' dtype."""
        codes, scale = self.quantize_inputs(inputs)
        return (codes * scale).to(inputs.dtype)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`, in the inputs' dtype; scales and bias are applied in float32."""
        codes, scale = self.quantize_inputs(inputs)
        output = self.product(codes.view(-1, codes.shape[-1])).view(*inputs.shape[:-1], self.shape[0]) * scale
        return (output if bias is None else output + bias.float()).to(inputs.dtype)


def integer_weight(
    weight: Tensor,
    activations: Activations,
    *,
    bits: int = 8,
    granularity: Granularity = "channel",
    group_size: int = 128,
    reach: tuple[Tensor, Tensor] | None = None,
) -> IntegerWeight:
    """A weight `[out, in]` rounded to symmetric grids, with float32 scales, for inputs that are quantized.

    Args:
        weight: left unchanged.
        activations: how inputs are quantized.
        bits: 2 to 8, of the weight.
        granularity: what shares a scale: the whole weight, an output channel, or `group_size` neighbours in a channel.
        group_size: of a group.
        reach: as in `IntegerWeight`.
    """
    integers, scale = absmax_round(to_groups(weight, granularity, group_size), bits)
    return IntegerWeight(
        integers.add_(2 ** (bits - 1)).to(torch.uint8),
        scale,
        None,
        bits=bits,
        granularity=granularity,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
        activations=activations,
        reach=reach,
    )
