r"""Weights of -1, 0 and 1 with one scale, five to a byte, and products of integers with them that never unpack them.

A byte holds five digits to the base 3, $\sum_i 3^i (w_i + 1)$, at most 242: 1.6 bits a weight, where $\log_2 3$ is 1.585. For few
rows of inputs a product looks bytes up: for five neighbouring inputs and each of 243 bytes a table holds what they make
together, and an output is a sum of entries, a fifth as many as it has weights. For many rows unpacking costs less.

Source: `bitnet-b1-58` (arXiv 2402.17764), Section 2, for absmean; the authors' "The Era of 1-bit LLMs: Training Tips, Code and FAQ",
microsoft/unilm@768a3c873f598bb9b4d4dfb9267b099e35f8fe56, bitnet/, Section 3, for the smallest mean, the norm and both scales applied after
the product.

Differs from the paper: none; its kernels pack in forms of their own.

Not here: kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.compression.protocol import CompressedWeight

DIGITS, BYTES = 5, 243
SMALLEST = 1e-5  # least mean magnitude of a weight, and least maximum of a token
FEW = 8  # rows of inputs up to which looking up is faster than unpacking, on a CPU
LANES = 4  # rows that are looked up together; one alone takes longer than four


def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\operatorname{RoundClip}(W / \gamma, -1, 1)$ and $\gamma$, the mean of $|W|$; both float32.

    Examples:
        >>> codes, scale = absmean(torch.tensor([[0.5, -3.5], [1.1, 0.9]]))
        >>> codes.tolist(), scale.item()
        ([[0.0, -1.0], [1.0, 1.0]], 1.5)
    """
    scale = weight.float().abs().mean().clamp(min=SMALLEST)
    return (weight.float() / scale).round_().clamp_(-1, 1), scale


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `[..., in]` as integers up to 127, float32, and the step that they count in, `[..., 1]`.

    Examples:
        >>> [part.tolist() for part in absmax_int8(torch.tensor([[254.0, -3.0]]))]
        [[[127.0, -2.0]], [[2.0]]]
    """
    step = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / 127
    return (x.float() / step).round_().clamp_(-128, 127), step


def pack_trits(codes: Tensor) -> Tensor:
    """Bytes of digits -1, 0, 1: `[..., n]` to `[..., ceil(n / 5)]`, uint8; the last byte is filled up with zeros.

    Examples:
        >>> pack_trits(torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0, -1.0])).tolist()  # 2 + 3 + 0 + 54 + 162; 0 + 3 + 9 + 27 + 81
        [221, 120]
    """
    fives = torch.unflatten(F.pad(codes, (0, -codes.shape[-1] % DIGITS)) + 1, -1, (-1, DIGITS))
    return (fives * _powers(codes)).sum(dim=-1).to(torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The first `count` digits of each row, float32.

    Examples:
        >>> unpack_trits(torch.tensor([221, 120], dtype=torch.uint8), 6).tolist()
        [1.0, 0.0, -1.0, 1.0, 1.0, -1.0]
    """
    digits = digits_of_bytes(packed.device).index_select(0, packed.flatten().int())
    return digits.view(*packed.shape[:-1], -1)[..., :count]


def digits_of_bytes(device: torch.device) -> Tensor:
    """The five digits of each byte, `[243, 5]`, float32."""
    places = torch.arange(BYTES, device=device).float()
    return (places[:, None] / _powers(places)).floor_().remainder_(3).sub_(1)


def _powers(like: Tensor) -> Tensor:
    return 3.0 ** torch.arange(DIGITS, device=like.device)


def multiply_packed(x: Tensor, packed: Tensor) -> Tensor:
    """Integers `[n, in]` times packed digits `[out, ceil(in / 5)]`: exact sums, `[n, out]`, float32.

    Args:
        x: float32 holding integers of 8 bits.
        packed: as `pack_trits` gives them.

    Examples:
        >>> multiply_packed(torch.tensor([[3.0, 5.0]]), pack_trits(torch.tensor([[1.0, -1.0], [0.0, 1.0]]))).tolist()
        [[-2.0, 5.0]]
    """
    n, groups = len(x), packed.shape[1]
    if n > FEW:
        return F.linear(x, unpack_trits(packed, x.shape[1]))
    x = F.pad(x, (0, groups * DIGITS - x.shape[1], 0, -n % LANES)).view(-1, groups, DIGITS)
    table = torch.einsum("ngd,bd->gbn", x, digits_of_bytes(x.device)).reshape(groups * BYTES, -1)
    entries = packed.int() + BYTES * torch.arange(groups, dtype=torch.int32, device=packed.device)
    return F.embedding_bag(entries, table, mode="sum").T[:n]


class TernaryWeight(CompressedWeight):
    """Packed digits with one scale, whose inputs are normalized and rounded to 8 bits, each token on its own grid.

    Args:
        weight: `[out, in]`, quantized by `absmean`; left unchanged.
        norm: `[in]`, what the normalized inputs are multiplied by, copied.
        eps: added to their mean square.
    """

    codes: Tensor
    scale: Tensor
    norm: Tensor

    def __init__(self, weight: Tensor, norm: Tensor, eps: float) -> None:
        super().__init__()
        self.shape, self.dtype, self.eps = (weight.shape[0], weight.shape[1]), weight.dtype, eps
        codes, scale = absmean(weight)
        self.register_buffer("codes", pack_trits(codes))
        self.register_buffer("scale", scale)
        self.register_buffer("norm", norm.detach().clone())

    def dense(self) -> Tensor:
        r"""$\gamma \tilde W$, `[out, in]`."""
        return (unpack_trits(self.codes, self.shape[1]) * self.scale).to(self.dtype)

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]`, normalized and rounded."""
        codes, step = absmax_int8(rms_norm(inputs, self.norm, self.eps))
        return (codes * step).to(inputs.dtype)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`: a product of integers, to which both scales are applied in float32."""
        codes, step = absmax_int8(rms_norm(inputs, self.norm, self.eps))
        product = multiply_packed(codes.reshape(-1, codes.shape[-1]), self.codes)
        output = product.view(*inputs.shape[:-1], self.shape[0]) * (self.scale * step)
        return (output if bias is None else output + bias.float()).to(inputs.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""$w \odot x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$ over the last dimension, in float32 up to the product with w."""
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
