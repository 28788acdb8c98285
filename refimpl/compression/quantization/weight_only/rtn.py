r"""RTN: round every weight to the nearest level of its group's grid.

Source: `integer-arithmetic-inference-2018` (arXiv 1712.05877), Eq. (1) for the affine map $r = S(q - Z)$ with an integer
zero point; its use on the channels of a weight, without clipping, is the round-to-nearest baseline of `gptq` (arXiv
2210.17323), Section 5, as are groups; the symmetric range is that of its official code,
IST-DASLab/gptq@2d65066eeb06a5c9ff5184d8cebdf33662c67faf, quant.py.

Differs from the paper: scales are stored in float16 and rounded up to it, where the paper keeps float32, of which its integer
arithmetic sees fixed-point ratios only. The symmetric range is $[-m, m]$ also where no weight is negative; there, the official
code takes $[0, m]$ with the zero point of $[-m, m]$, and clips the upper half.

Not here: clipping (`mse_clip`, `kl_clip`), quantized activations, integer kernels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refimpl.compression.protocol import check_layer
from refimpl.compression.quantization.affine import Granularity, affine_grid, quantize, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class RTN:
    r"""Round-to-nearest quantization of a weight, without data.

    Inside a group's range $[a, b]$ the grid has the step $s = (b - a) / (2^{bits} - 1)$, and no weight moves by more than
    $s/2$.

    Args:
        bits: 1 to 8.
        granularity: what shares a scale: the whole tensor, an output channel, or `group_size` neighbours in a channel.
        group_size: weights in a group; where it does not divide a channel, the channel's last group is shorter.
        symmetric: the range is $[-m, m]$ and no zero point is stored.
        scale_dtype: what scales are stored in.

    Examples:
        Two bytes hold up to eight codes of 2 bits; a scale takes two, and up to eight zero points take two:

        >>> weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> packed = RTN(bits=2, group_size=4)(weight)
        >>> packed.dense().tolist(), packed.nbytes
        ([[0.0, 1.0, 2.0, 3.0]], 6)
    """

    needs_inputs: ClassVar[bool] = False

    bits: int = 4
    granularity: Granularity = "group"
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"granularity={self.granularity!r} must be 'tensor', 'channel' or 'group'")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"scale_dtype={self.scale_dtype} must be torch.float16, torch.bfloat16 or torch.float32")

    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:  # noqa: ARG002 - the protocol passes it
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            Packed codes, scales and zero points; `dense()` has the weight's dtype.

        Raises:
            ValueError: the weight is no matrix, is empty, holds NaN or infinity, or is too large for `scale_dtype`.
        """
        check_layer(weight)
        groups = to_groups(weight, self.granularity, self.group_size)
        low, high = self.covered(weight)
        scale, zero = affine_grid(low, high, self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)
        return QuantizedWeight(
            quantize(groups, scale, zero, self.bits),
            scale,
            None if self.symmetric else zero,
            bits=self.bits,
            granularity=self.granularity,
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
        )

    def covered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The range that each group's grid covers, `[groups]` twice: all of it; methods that clip narrow it."""
        return to_groups(weight, self.granularity, self.group_size).aminmax(dim=1)
