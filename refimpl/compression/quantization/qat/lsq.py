r"""LSQ: the step sizes of weights and activations are parameters, trained by the loss like the weights.

Source: `lsq` (arXiv 1902.08153), Eqs. (1) and (2) for the quantizer, Eq. (3) for the gradient of the step, Eq. (5) for that of the
value, Section 2.1 for the start $s = 2\langle|v|\rangle / \sqrt{Q_P}$, Section 2.2 for the scale $g = 1/\sqrt{N Q_P}$ of the
step's gradient, Section 2.3 for the first and the last layer in 8 bits; the authors published no code beyond the appendix.

Differs from the paper: inputs are unsigned where the first batch has no negative one, as after ReLU, and signed otherwise, as in a
transformer; the paper's are all unsigned but the image. The features N of inputs are those of one token, since a language model's
loss is a mean over tokens. In a decoder the first layer is the embedding, which multiplies nothing and stays as it is, and the last is
the output layer, in 8 bits where it has a weight of its own. A step may be shared by a channel or a group of weights instead of all;
one that training drives through 0 counts by its magnitude.

Not here: weight decay by bits (Section 3.1 halves and quarters it), an optimizer's; distillation (Section 3.7).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.activations import Activations, IntegerWeight
from refimpl.compression.quantization.affine import Granularity, from_groups, to_groups
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.qat.protocol import QAT, FakeLinear

EDGE_BITS = 8
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class LSQ(QAT):
    """Learned step size quantization.

    Args:
        bits: of weights, 2 to 8; the paper's are 2, 3, 4 and 8.
        activation_bits: of inputs, 2 to 8, with one step a layer; the paper's are those of the weights. None leaves them.
        granularity: what shares a step: the whole weight, as in the paper, an output channel, or `group_size` neighbours.
        group_size: weights in a group; where it does not divide a channel, the channel's last group is shorter.
        edges: patterns of the names of the first and the last layer, whose weights and inputs get 8 bits.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.9, -0.5]]))
        >>> LSQ(bits=2, activation_bits=None).prepare(model)[0].step.item()  # 2 (0.9 + 0.5) / 2 / 1
        1.399999976158142
    """

    skip: ClassVar[tuple[str, ...]] = ()

    bits: int = 4
    activation_bits: int | None = 4
    granularity: Granularity = "tensor"
    group_size: int = 128
    edges: Sequence[str] = ("lm_head",)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits={self.bits} must be 2 to 8: with 1 there is no positive level, and g = 1/sqrt(N Q_P) is infinite"
            )
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits={self.activation_bits} must be 2 to 8, or None")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"granularity={self.granularity!r} must be 'tensor', 'channel' or 'group'")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        if isinstance(self.edges, str):
            raise ValueError(f"edges={self.edges!r} must be a list of patterns: [{self.edges!r}]")

    def replacements(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[nn.Module, nn.Module]:  # noqa: ARG002 - the protocol passes it
        """A trainable layer for each."""
        return {layer: LSQLinear(name, layer, self) for name, layer in layers.items()}


class LSQLinear(FakeLinear):
    """A linear layer with a learned step for its weight, `step`, `[]` or `[groups, 1]`, and one for its inputs, `input_step`, `[]`.

    Args:
        name: of the layer, by which the first and the last are known.
        layer: copied.
        method: its settings.
    """

    placed: Tensor
    unsigned: Tensor

    def __init__(self, name: str, layer: nn.Linear, method: LSQ) -> None:
        super().__init__(layer)
        edge = any(fnmatchcase(name, pattern) for pattern in method.edges)
        self.name, self.bits, self.input_bits = name, method.bits, method.activation_bits
        if edge:
            self.bits, self.input_bits = EDGE_BITS, EDGE_BITS if self.input_bits else None
        self.granularity, self.group_size = method.granularity, method.group_size
        groups = to_groups(self.weight.detach(), self.granularity, self.group_size).float()
        step = first_step(groups, bounds(self.bits)[1])
        self.step = nn.Parameter(step.squeeze() if self.granularity == "tensor" else step)
        if self.input_bits is not None:
            self.input_step = nn.Parameter(torch.ones((), device=self.weight.device))
            for buffer in ("placed", "unsigned"):
                self.register_buffer(buffer, torch.zeros((), dtype=torch.bool, device=self.weight.device))

    def rounded(self) -> Tensor:
        r"""$\hat w$, of Eqs. (1) and (2)."""
        groups = to_groups(self.weight, self.granularity, self.group_size)
        q_n, q_p = bounds(self.bits)
        return from_groups(lsq(groups, self.step, q_n, q_p), (self.weight.shape[0], self.weight.shape[1]))

    def read(self, inputs: Tensor) -> Tensor:
        r"""$\hat x$; the first batch in training mode places the step."""
        if self.input_bits is None:
            return inputs
        if self.training and not bool(self.placed):
            self._place(inputs.detach().float())
        return lsq(inputs, self.input_step, *self._input_bounds(), n=inputs.shape[-1])

    @torch.no_grad()
    def _place(self, inputs: Tensor) -> None:
        self.unsigned.fill_(bool(inputs.amin() >= 0))
        self.placed.fill_(value=True)
        self.input_step.copy_(first_step(inputs.reshape(1, -1), self._input_bounds()[1]).squeeze())

    def _input_bounds(self) -> tuple[int, int]:
        if not bool(self.placed):
            raise ValueError(
                f"layer {self.name!r} has seen no inputs, and has no step for them: run a batch through the model in training "
                "mode first, or set activation_bits=None"
            )
        assert self.input_bits is not None
        return bounds(self.input_bits, unsigned=bool(self.unsigned))

    @torch.no_grad()
    def held(self) -> CompressedWeight:
        """Packed codes with their steps in float32, as the paper has them."""
        q_n, q_p = bounds(self.bits)
        groups = to_groups(self.weight, self.granularity, self.group_size).float()
        step = positive(self.step)
        codes = (groups / step).round_().clamp_(-q_n, q_p).add_(q_n).to(torch.uint8)
        options: dict[str, Any] = {
            "bits": self.bits,
            "granularity": self.granularity,
            "shape": (self.weight.shape[0], self.weight.shape[1]),
            "dtype": self.weight.dtype,
        }
        if self.input_bits is None:
            return QuantizedWeight(codes, step.flatten(), None, **options)
        low, high = self._input_bounds()
        step_in = positive(self.input_step)
        activations = Activations(bits=self.input_bits, scope="static", symmetric=False)
        packed = IntegerWeight(
            codes, step.flatten(), None, **options, activations=activations, reach=(-low * step_in, high * step_in)
        )
        assert packed.input_scale is not None and packed.input_zero is not None
        packed.input_scale.copy_(step_in)  # of its own, not as it comes back from the range
        packed.input_zero.fill_(low)
        return packed


def bounds(bits: int, *, unsigned: bool = False) -> tuple[int, int]:
    """$Q_N$ and $Q_P$, Section 2.

    Examples:
        >>> bounds(3), bounds(3, unsigned=True)
        ((4, 3), (0, 7))
    """
    return (0, 2**bits - 1) if unsigned else (2 ** (bits - 1), 2 ** (bits - 1) - 1)


def first_step(groups: Tensor, q_p: int) -> Tensor:
    r"""Where a step starts, $2 \langle |v| \rangle / \sqrt{Q_P}$; a group of zeros gets the smallest float.

    Args:
        groups: `[groups, size]`, float32.
        q_p: $Q_P$.

    Returns:
        `[groups, 1]`.

    Examples:
        >>> first_step(torch.tensor([[4.0, -2.0]]), 9).tolist()
        [[2.0]]
    """
    return (2 * groups.abs().mean(dim=1, keepdim=True) / math.sqrt(q_p)).clamp(min=SMALLEST)


def positive(step: Tensor) -> Tensor:
    """A step's magnitude, never 0."""
    return step.abs().clamp(min=SMALLEST)


def lsq(v: Tensor, step: Tensor, q_n: int, q_p: int, n: int | None = None) -> Tensor:
    r"""$\hat v = \operatorname{round}(\operatorname{clip}(v / s, -Q_N, Q_P))\, s$, with the gradients of Eqs. (3) and (5).

    The gradient of s is the sum over all values that share it, times $g = 1 / \sqrt{N Q_P}$.

    Args:
        v: any shape; `[groups, size]` where there is a step for each group.
        step: `[]`, or `[groups, 1]`; float32.
        q_n: $Q_N$.
        q_p: $Q_P$.
        n: $N$; None stands for the number of values that share a step, as of weights.

    Returns:
        v's shape and dtype; the arithmetic is float32.

    Examples:
        >>> v, s = torch.tensor([0.6, 9.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> lsq(v, s, 4, 3).sum().backward()
        >>> v.grad.tolist(), s.grad.item()  # (round(0.6) - 0.6 + 3) / sqrt(2 * 3)
        ([1.0, 0.0], 1.38804...)
    """
    quantized: Tensor = _LSQ.apply(v, positive(step), q_n, q_p, n or v.numel() // step.numel())  # type: ignore[no-untyped-call]
    return quantized


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, q_n: int, q_p: int, n: int) -> Tensor:
        ratio = v.float() / step
        ctx.save_for_backward(ratio, step)
        ctx.bounds, ctx.n = (q_n, q_p), n
        return (ratio.round().clamp_(-q_n, q_p) * step).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        ratio, step = ctx.saved_tensors
        q_n, q_p = ctx.bounds
        inside = (ratio > -q_n) & (ratio < q_p)
        per_step = torch.where(inside, ratio.round() - ratio, ratio.clamp(-q_n, q_p)).mul_(gradients[0])
        g = 1 / math.sqrt(ctx.n * q_p)
        return gradients[0] * inside, g * per_step.sum_to_size(step.shape), None, None, None
