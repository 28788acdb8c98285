r"""Layers whose inputs, or outputs, are quantized in clusters of channels.

Source: `rptq` (arXiv 2304.01089), the section on clustering and reordering of channels; official code hahnyuan/RPTQ4LLM@96190691f02be6b27ba24d5a73574dbf9a8336c6,
quantize/int_linear.py and int_matmul.py.

Differs from the paper: integers are multiplied as `activations` states; the official code multiplies rounded numbers.

Not here: how channels are clustered, which is `clusters`.
"""

import torch
from torch import Tensor

from refimpl.compression.protocol import CompressedLinear, CompressedWeight
from refimpl.compression.quantization.activations import exact_product
from refimpl.compression.quantization.clusters import ClusterGrids
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.model.bits import unpack


class ClusteredWeight(CompressedWeight):
    r"""Packed codes of a weight whose inputs are quantized in clusters: a product of integers for each, $\sum_i s_i (Q_i - z_i) W_i^\top$.

    Args:
        stored: the weight, one grid for each row.
        grids: of the inputs; the channels of a cluster stand side by side.
    """

    def __init__(self, stored: QuantizedWeight, grids: ClusterGrids) -> None:
        super().__init__()
        self.stored, self.grids = stored, grids

    def dense(self) -> Tensor:
        """What the quantized inputs are multiplied by."""
        return self.stored.dense()

    def read(self, inputs: Tensor) -> Tensor:
        """Each channel on its cluster's grid."""
        return self.grids.read(inputs)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`, in the inputs' dtype; zero points add the same to all rows, and are applied afterwards."""
        rows, columns = self.stored.shape
        zero = self.stored.zero
        assert zero is not None
        w = unpack(self.stored.codes, self.stored.bits, rows * columns).view(rows, columns).float()
        w -= unpack(zero, self.stored.bits, rows).float()[:, None]
        codes, counts = self.grids.codes(inputs).flatten(0, -2), torch.bincount(self.grids.labels.int()).tolist()
        output = codes.new_zeros(len(codes), rows)
        parts = zip(torch.split(codes, counts, 1), torch.split(w, counts, 1), self.grids.scale, strict=True)
        for x, part, step in parts:
            output += exact_product(x, part, self.stored.bits + self.grids.bits) * step
        shift = (self.grids.scale * self.grids.zero)[self.grids.labels.int()]
        output = ((output - w @ shift) * self.stored.scale.float()).float()
        output = output.view(*inputs.shape[:-1], rows)
        return (output if bias is None else output + bias.float()).to(inputs.dtype)


class ClusterRounded(CompressedLinear):
    """A layer whose last outputs are rounded in clusters.

    Args:
        compressed: the weight.
        bias: `[out]`, copied.
        outputs: the grids; outputs before those that they are for stay as they are.
    """

    def __init__(self, compressed: CompressedWeight, bias: Tensor | None, outputs: ClusterGrids) -> None:
        super().__init__(compressed, bias)
        self.outputs = outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        made = super().forward(inputs)
        kept = made.shape[-1] - len(self.outputs.labels)
        return torch.cat([made[..., :kept], self.outputs.read(made[..., kept:])], dim=-1)
