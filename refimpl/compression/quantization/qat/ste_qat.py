r"""QAT with the straight-through estimator: the grid of round-to-nearest in the forward pass, gradients straight through it.

Source: `integer-arithmetic-inference-2018` (arXiv 1712.05877), Section 3, Eq. (12), for simulated quantization, ranges nudged so
that 0 is a level, and activations whose ranges are averages over batches; the estimator is that of `ste-2013` (arXiv 1308.3432).
The authors' code is TensorFlow's fake_quant_with_min_max_vars, whose gradient is that of the clamp, here too: 1 for a value in the
nudged range, its ends included, 0 beyond.

Differs from the paper: grids are those of `rtn`, whose scales are stored in float16 and which may be shared by a channel or a
group; the paper's are one for each weight, in float32. All $2^{bits}$ codes are used; the paper leaves the lowest one of weights
unused, for its kernels. The average of ranges starts at the first batch.

Not here: folding of batch normalization; quantized biases (32-bit integers in the paper); integer kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.activations import Activations, IntegerWeight
from refimpl.compression.quantization.affine import (
    Granularity,
    affine_grid,
    dequantize,
    from_groups,
    quantize,
    to_groups,
)
from refimpl.compression.quantization.qat.protocol import QAT, FakeLinear
from refimpl.compression.quantization.qat.straight_through import straight_through
from refimpl.compression.quantization.weight_only.rtn import RTN


@dataclass(frozen=True, kw_only=True)
class STEQAT(QAT):
    """Training through round-to-nearest.

    Args:
        bits: of weights, 1 to 8; the paper's are 4 to 8.
        granularity: what shares a grid of weights: the whole tensor, as in the paper, an output channel, or `group_size`
            neighbours in a channel.
        group_size: weights in a group; where it does not divide a channel, the channel's last group is shorter.
        symmetric: the range of weights is [-m, m].
        activation_bits: of inputs, 2 to 8, on one grid for each layer; None leaves them as they are.
        decay: of the average of the inputs' ranges, 0 to below 1; "close to 1" in the paper, 0.99 in PyTorch's observer.
        delay: batches before inputs are quantized, while their ranges settle. 50 thousand to 2 million in the paper, which
            trains from nothing.

    Examples:
        >>> layer = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[-1.0, 0.4, 1.6, 2.0]]))
        >>> STEQAT(bits=2, activation_bits=None).prepare(layer)(torch.eye(4)).flatten().tolist()
        [-1.0, 0.0, 2.0, 2.0]
    """

    bits: int = 4
    granularity: Granularity = "group"
    group_size: int = 128
    symmetric: bool = False
    activation_bits: int | None = 8
    decay: float = 0.99
    delay: int = 0

    def __post_init__(self) -> None:
        self.rtn  # checks what the two share  # noqa: B018
        if self.activation_bits is not None:
            Activations(bits=self.activation_bits)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be 0 (the last batch alone) to below 1")
        if self.delay < 0:
            raise ValueError(f"delay={self.delay} must be 0 or more batches")

    @property
    def rtn(self) -> RTN:
        """What `convert` makes of the trained weights."""
        return RTN(bits=self.bits, granularity=self.granularity, group_size=self.group_size, symmetric=self.symmetric)

    def replacements(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[nn.Module, nn.Module]:  # noqa: ARG002 - the protocol passes it
        """A trainable layer for each."""
        return {layer: STELinear(name, layer, self) for name, layer in layers.items()}


class STELinear(FakeLinear):
    """A linear layer on the grids of round-to-nearest, found anew at each call; inputs on the grid of their average range.

    Args:
        name: of the layer, for messages.
        layer: copied.
        method: its settings.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, name: str, layer: nn.Linear, method: STEQAT) -> None:
        super().__init__(layer)
        self.name, self.method = name, method
        self.activations = None
        if method.activation_bits is not None:
            self.activations = Activations(bits=method.activation_bits, scope="static", symmetric=False)
            for buffer in ("low", "high"):
                self.register_buffer(buffer, torch.zeros((), dtype=torch.float32, device=self.weight.device))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def rounded(self) -> Tensor:
        r"""$\hat W$; a weight outside of its grid's range gets no gradient."""
        method, weight = self.method, self.weight.detach()
        groups = to_groups(weight, method.granularity, method.group_size)
        scale, zero = self._grids(groups)
        values = dequantize(quantize(groups, scale, zero, method.bits), scale, zero)
        inside = in_range(groups.float(), scale.float()[:, None], zero[:, None], method.bits)
        shape = (weight.shape[0], weight.shape[1])
        return straight_through(self.weight, from_groups(values, shape), from_groups(inside, shape))

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]` on their grid; in training mode their range is counted in first."""
        if self.activations is None:
            return inputs
        if self.training:
            self._track(inputs.detach())
            if int(self.seen) <= self.method.delay:
                return inputs
        scale, zero = self.activations.grid(*self.reach())
        codes, step = self.activations.quantize(inputs.detach(), (scale, zero))
        inside = in_range(inputs.detach().float(), scale, zero, self.activations.bits)
        return straight_through(inputs, codes * step, inside)

    def reach(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest input on average, scalars.

        Raises:
            ValueError: there was none yet.
        """
        if not int(self.seen):
            raise ValueError(
                f"layer {self.name!r} has seen no inputs, and has no grid for them: run a batch through the model in training "
                "mode first, or set activation_bits=None"
            )
        return self.low, self.high

    def _track(self, inputs: Tensor) -> None:
        """Count a batch's range into the average."""
        low, high = (extreme.float() for extreme in torch.aminmax(inputs))
        kept = self.method.decay if int(self.seen) else 0.0
        self.low.lerp_(low, 1 - kept)
        self.high.lerp_(high, 1 - kept)
        self.seen += 1

    def _grids(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        method = self.method.rtn
        low, high = groups.aminmax(dim=1)
        return affine_grid(low, high, method.bits, symmetric=method.symmetric, scale_dtype=method.scale_dtype)

    def held(self) -> CompressedWeight:
        """The weight as round-to-nearest packs it; with it the grid of its inputs."""
        method, weight = self.method, self.weight.detach()
        if self.activations is None:
            return method.rtn(weight)
        groups = to_groups(weight, method.granularity, method.group_size)
        scale, zero = self._grids(groups)
        options: dict[str, Any] = {"bits": method.bits, "granularity": method.granularity, "dtype": weight.dtype}
        return IntegerWeight(
            quantize(groups, scale, zero, method.bits),
            scale,
            None if method.symmetric else zero,
            shape=(weight.shape[0], weight.shape[1]),
            activations=self.activations,
            reach=self.reach(),
            **options,
        )


def in_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    r"""Whether values lie in the range of a grid, $-z s \le x \le (2^{bits} - 1 - z) s$.

    Args:
        x: any shape, float32.
        scale: broadcasts to it.
        zero: broadcasts to it, integers.
        bits: of the grid.

    Examples:
        >>> in_range(torch.tensor([-1.1, -1.0, 2.0, 2.1]), torch.tensor(1.0), torch.tensor(1.0), 2).tolist()
        [False, True, True, False]
    """
    inside: Tensor = (x >= -zero * scale) & (x <= (2**bits - 1 - zero) * scale)
    return inside
