r"""QuIP: rotate a weight at random from both sides, so that no entry stands out, and round it with linear feedback.

Source: `quip` (arXiv 2307.13304), Section 3 with Eq. (2) and (3) for LDLQ; Section 4 with Algorithms 1, 2 and 3 and the heuristics of
Section 4.2; official code Cornell-RelaxML/QuIP@ac92cfc7a22f6100009e2caf53bb72257d3f3184, method.py (`preproc`, `postproc`) and
vector_balance.py (`round_ldl_gptqequiv`, `quantize_weight_vecbal`).

Differs from the paper: columns that get no input are set to zero, and their diagonal in the Hessian to the mean. Where the official
code differs from the paper, the paper is followed: $U = U_1 \otimes U_2$ has one matrix of each size (in the code, each block has
its own); the Hessian is damped once, at the beginning (in the code after the rescaling, and again after the rotation); columns are
rounded from the first to the last (in the code from the last to the first). Permutations stand before and after the product, as in
the code. The rescaling is stored in float16, and used as stored. Layers of one shape that are given one seed get the same rotations.

Not here: QuIP-RG, with its reordering and greedy passes; stochastic rounding; the bounded feedback of Algorithm 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.compression.hessian import BLOCK, damp, layer_hessian
from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.affine import affine_grid
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.rotation import rotations
from refimpl.model.bits import pack, unpack


@dataclass(frozen=True, kw_only=True)
class QuIP:
    r"""Quantization with incoherence processing.

    Args:
        bits: 1 to 8; the paper's are 2, 3 and 4.
        incoherent: rotate and rescale, and round on a grid of $\pm \rho$ root mean squares. False is LDLQ alone, on the grids of
            whole channels, which equals GPTQ.
        rho: the grid's half width, in root mean squares of the rotated weight.
        damping: $\alpha$, share of the mean of $H$'s diagonal that is added to it, 0 or more.
        seed: of the rotations.

    Examples:
        >>> weight, inputs = torch.eye(8), torch.eye(8)
        >>> packed = QuIP(bits=2)(weight, inputs)
        >>> packed.nbytes  # 64 codes, 8 factors of columns, a scale and a seed
        44
    """

    bits: int = 2
    incoherent: bool = True
    rho: float = 2.4
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if not 0 < self.rho < float("inf"):
            raise ValueError(f"rho={self.rho} must be positive; the official code uses 2.4")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more; the official code uses 0.01")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be 0 or more, and below 2^63")

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Quantize a weight; the arithmetic is float32 whatever its dtype.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: `[n, in]`, the layer's calibration inputs.

        Returns:
            Packed codes with a seed, a rescaling and a scale, or, without incoherence, scales and zero points.

        Raises:
            ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity; the
                damping is too small for these inputs.
        """
        hessian, dead = layer_hessian("QuIP", weight, inputs)
        hessian, rows, top = damp(hessian, dead, self.damping), weight.float().masked_fill(dead, 0), 2**self.bits - 1
        shape = (weight.shape[0], weight.shape[1])
        if not self.incoherent:
            low, high = rows.aminmax(dim=1)
            scale, zero = affine_grid(low, high, self.bits, symmetric=False, scale_dtype=torch.float16)
            codes = ldlq(rows / scale.float()[:, None] + zero[:, None], hessian, self.bits)
            return QuantizedWeight(
                codes, scale, zero, bits=self.bits, granularity="channel", shape=shape, dtype=weight.dtype
            )
        rescale = rescaling(rows, hessian)
        d = rescale.float()
        rows, hessian = rows * d, hessian / d.outer(d)
        u, v = rotations(self.seed, shape, weight.device)
        rows, hessian = u.apply(v.apply(rows).T).T, v.apply(v.apply(hessian).T)  # the Hessian is its own transpose
        scale = self.rho * rows.square().mean().sqrt()
        units = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny) + 1) / 2 * top
        return RotatedWeight(
            ldlq(units.clamp_(0, top), hessian, self.bits), scale, rescale, self.seed, self.bits, weight.dtype
        )


def ldlq(weight: Tensor, hessian: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    r"""Codes of a weight by adaptive rounding with linear feedback (Eq. 2, Section 3.1).

    Column k is rounded after $(W_{1:k-1} - \hat W_{1:k-1}) a_k$ is added to it, where $a_k$ is the part above the diagonal of
    column k of R, and $H = (R + I) D (R + I)^\top$.

    Args:
        weight: `[out, in]`, in units of the grid: a level is an integer from 0 to `2^bits - 1`.
        hessian: $H$, `[in, in]`, positive definite.
        bits: 1 to 8.
        block: columns in a block; feedback from the blocks before is added at once. No result depends on it but for rounding.

    Returns:
        `[out, in]`, uint8.

    Raises:
        ValueError: H is not positive definite.

    Examples:
        >>> ldlq(torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 0.99], [0.99, 1.0]]), 2).tolist()
        [[0, 1]]
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError(
            "the Hessian of these inputs is singular: raise damping (0.01 is the default), or give more rows"
        )
    upper = lower.flip(0, 1)
    feedback: Tensor = upper / upper.diagonal()  # R + I
    columns = weight.T.clone()
    errors = torch.zeros_like(columns)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        for k in range(start, end):
            before = slice(start, k)
            wanted = columns[k].addmv(errors[before].T, feedback[before, k])
            code = wanted.round().clamp_(0, 2**bits - 1)
            codes[k] = code
            errors[k] = weight[:, k] - code
        columns[end:].addmm_(feedback[start:end, end:].T, errors[start:end])
    return codes.T


def rescaling(weight: Tensor, hessian: Tensor) -> Tensor:
    r"""$D$, `[in]`, float16, at most 1: $D_j = (H_{jj} / \|W_{:,j}\|^2)^{1/4}$ (Algorithm 1, line 3).

    Among all diagonal rescalings this one makes $\operatorname{tr}(D^{-1} H D^{-1})\, \|W D\|_F^2$ least. Each quantity is raised to
    1e-8 of its greatest, so that columns without weights or inputs stay in range.

    Examples:
        >>> rescaling(torch.tensor([[1.0, 4.0]]), torch.diag(torch.tensor([16.0, 1.0]))).tolist()
        [1.0, 0.25]
    """
    energy, size = hessian.diagonal(), weight.square().sum(dim=0)
    energy, size = (x.clamp(min=max(1e-8 * float(x.max()), 1e-30)) for x in (energy, size))
    d = (energy / size).sqrt().sqrt()
    return (d / d.max()).to(torch.float16)


class RotatedWeight(CompressedWeight):
    r"""Codes of a rotated and rescaled weight: $\hat W = U^\top Q V D^{-1}$ (Algorithm 2).

    U and V are made anew from the seed at each use.

    Args:
        codes: `[out, in]`, uint8.
        scale: the grid's half width, a single number.
        rescale: $D$, `[in]`.
        seed: of U and V.
        bits: of a code.
        dtype: of the dense weight.
    """

    codes: Tensor
    scale: Tensor
    rescale: Tensor
    seed: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, rescale: Tensor, seed: int, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, (codes.shape[0], codes.shape[1]), dtype
        self.register_buffer("codes", pack(codes.flatten(), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("rescale", rescale)
        self.register_buffer("seed", torch.tensor(seed, device=codes.device))

    def dense(self) -> Tensor:
        r"""$\hat W$, `[out, in]`."""
        u, v = rotations(int(self.seed), self.shape, self.codes.device)
        return (u.undo(v.undo(self._levels()).T).T / self.rescale.float()).to(self.dtype)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        r"""$X \hat W^\top + b$, `[..., in]` to `[..., out]`: the inputs are rotated, and the product back; float32 between."""
        u, v = rotations(int(self.seed), self.shape, self.codes.device)
        output = u.undo(v.apply(inputs.float() / self.rescale.float()) @ self._levels().T)
        return (output if bias is None else output + bias.float()).to(inputs.dtype)

    def _levels(self) -> Tensor:
        """Q, `[out, in]`, float32."""
        codes = unpack(self.codes, self.bits, self.shape[0] * self.shape[1]).view(self.shape)
        levels: Tensor = (codes.float() * (2 / (2**self.bits - 1)) - 1) * self.scale
        return levels
