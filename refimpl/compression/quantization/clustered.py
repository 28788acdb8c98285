r"""Layers that are quantized in clusters of channels: their weights, their inputs, or their outputs.

Source: `rptq` (arXiv 2304.01089), the section on clustering and reordering of channels; official code
hahnyuan/RPTQ4LLM@96190691f02be6b27ba24d5a73574dbf9a8336c6, quantize/int_linear.py and int_matmul.py; quantize/gptq.py and quantizer.py for
weights, each row of which has a grid for every cluster of its columns, fixed before the sweep.

Differs from the paper: integers are multiplied as `activations` states; the official code multiplies rounded numbers. A weight's grids are
those of `affine`, $2^{bits} - 1$ steps and 0 among the levels; the official code takes $2^{bits}$ and clips the uppermost.

Not here: how channels are clustered, which is `clusters`.
"""

import torch
from torch import Tensor

from refimpl.compression.hessian import Sweep, inverse_factor, layer_hessian
from refimpl.compression.protocol import CompressedLinear, CompressedWeight
from refimpl.compression.quantization.activations import exact_product
from refimpl.compression.quantization.affine import affine_grid
from refimpl.compression.quantization.clusters import ClusterGrids
from refimpl.model.bits import pack, unpack

DAMPING = 0.01  # the official code's share of the Hessian's mean diagonal


class ClusterScaledWeight(CompressedWeight):
    """Packed codes of a weight with a scale and a zero point for each row and cluster of columns.

    Args:
        codes: `[out, in]`, integers below `2^bits`.
        scale: `[clusters, out]`.
        zero: `[clusters, out]`, integers below `2^bits`.
        labels: `[in]`, the cluster of each column, counted from 0.
        bits: 1 to 8.
        dtype: of the dense weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    labels: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, labels: Tensor, *, bits: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.bits, self.dtype, self.shape = bits, dtype, (codes.shape[0], codes.shape[1])
        self.register_buffer("codes", pack(codes.flatten().to(torch.uint8), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", pack(zero.flatten().to(torch.uint8), bits))
        self.register_buffer("labels", labels.to(torch.int16 if len(scale) <= 2**15 else torch.int32))

    def integers(self) -> Tensor:
        """Codes less their zero points, `[out, in]`, float32 holding integers."""
        rows, columns = self.shape
        codes = unpack(self.codes, self.bits, rows * columns).view(rows, columns)
        zero = unpack(self.zero, self.bits, self.scale.numel()).view_as(self.scale)
        return codes.float() - zero.float()[self.labels.int()].T

    def dense(self) -> Tensor:
        r"""$\hat W = (Q - Z) s$, `[out, in]`."""
        return (self.integers() * self.scale.float()[self.labels.int()].T).to(self.dtype)


@torch.no_grad()
def clustered_gptq(weight: Tensor, inputs: Tensor, labels: Tensor, bits: int) -> ClusterScaledWeight:
    """GPTQ on grids for each row and cluster of columns, which cover the weight as it is given.

    Args:
        weight: `[out, in]`; left unchanged.
        inputs: `[n, in]`, the layer's calibration inputs.
        labels: `[in]`, the cluster of each column, counted from 0.
        bits: 1 to 8.

    Raises:
        ValueError: inputs are all zero; weight or inputs are misshapen, or hold NaN or infinity.

    Examples:
        Three steps reach from 0 to 3, and three from 0 to 0.3:

        >>> weight, labels = torch.tensor([[1.0, 3.0, 0.125, 0.375]]), torch.tensor([0, 0, 1, 1])
        >>> clustered_gptq(weight, torch.eye(4), labels, 2).dense().tolist()
        [[1.0, 3.0, 0.125, 0.375]]
    """
    hessian, dead = layer_hessian("RPTQ", weight, inputs)
    columns = weight.float().masked_fill(dead, 0).T.contiguous()  # [in, out]: a column of W is a row of it
    index = labels.long()[:, None].expand_as(columns)
    ends = columns.new_zeros(int(labels.max()) + 1, len(weight))
    low, high = (ends.scatter_reduce(0, index, columns, end) for end in ("amin", "amax"))  # 0 is among the levels
    scale, zero = affine_grid(low, high, bits, symmetric=False, scale_dtype=torch.float16)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for i, sweep in enumerate(Sweep(columns, inverse_factor(hessian, dead, DAMPING))):
        step, level = scale[labels[i]].float(), zero[labels[i]]
        q = torch.round(sweep.column / step).add_(level).clamp_(0, 2**bits - 1)
        codes[i] = q
        sweep.settle(q.sub_(level).mul_(step))
    return ClusterScaledWeight(codes.T, scale, zero, labels, bits=bits, dtype=weight.dtype)


class ClusteredWeight(CompressedWeight):
    r"""A weight whose inputs are quantized in the same clusters: a product of integers for each, $\sum_i s_i (Q_i - z_i) W_i^\top$.

    Args:
        stored: the weight.
        grids: of the inputs; the channels of a cluster stand side by side.
    """

    def __init__(self, stored: ClusterScaledWeight, grids: ClusterGrids) -> None:
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
        stored, grids, rows = self.stored, self.grids, self.stored.shape[0]
        codes, counts = grids.codes(inputs).flatten(0, -2), torch.bincount(grids.labels.int()).tolist()
        parts, scale = torch.split(stored.integers(), counts, 1), stored.scale.float()
        output = codes.new_zeros(len(codes), rows)
        for x, part, step in zip(torch.split(codes, counts, 1), parts, grids.scale[:, None] * scale, strict=True):
            output += exact_product(x, part, stored.bits + grids.bits) * step
        sums = torch.stack([part.sum(dim=1) for part in parts])  # [clusters, out]
        output -= ((grids.scale * grids.zero)[:, None] * scale * sums).sum(dim=0)
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
