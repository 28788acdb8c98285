r"""Random rotations of a layer's inputs and outputs that a seed gives back, and that cost less than the layer.

A dense orthogonal matrix of order n would be as large as the layer. A Kronecker product of two, $U_1 \otimes U_2$ of orders p and
n / p, holds $p^2 + n^2 / p^2$ numbers, and mixes all n coordinates as well.

Source: `quip` (arXiv 2307.13304), Section 4.1 and the permutations of Section 4.2; official code
Cornell-RelaxML/QuIP@ac92cfc7a22f6100009e2caf53bb72257d3f3184, method.py.

Differs from the paper: p is the divisor of n nearest to its root from below; the official code multiplies every other prime factor.
The factors are uniform over all orthogonal matrices; in the official code over those of determinant 1.

Not here: Hadamard matrices.
"""

import math

import torch
from torch import Tensor


class Rotation:
    r"""A random orthogonal matrix $P_2 (U_1 \otimes U_2) P_1$ of order n, applied in $O(n \sqrt n)$ where n has a divisor near its root.

    Args:
        n: its order.
        generator: on the CPU; the factors are Haar-distributed, $P_1$ and $P_2$ random permutations.
        device: where it is applied.
    """

    def __init__(self, n: int, generator: torch.Generator, device: torch.device) -> None:
        p = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
        self.left, self.right = (haar(size, generator).float().to(device) for size in (p, n // p))
        self.first, self.last = (torch.randperm(n, generator=generator).to(device) for _ in range(2))

    def apply(self, x: Tensor) -> Tensor:
        """$U x$ for each row of `[..., n]`."""
        grid = torch.unflatten(x[..., self.first], -1, (len(self.left), len(self.right)))
        rotated: Tensor = (self.left @ grid @ self.right.T).flatten(-2)[..., self.last]
        return rotated

    def undo(self, x: Tensor) -> Tensor:
        r"""$U^\top x$ for each row of `[..., n]`."""
        grid = torch.unflatten(x[..., self.last.argsort()], -1, (len(self.left), len(self.right)))
        rotated: Tensor = (self.left.T @ grid @ self.right).flatten(-2)[..., self.first.argsort()]
        return rotated


def rotations(seed: int, shape: tuple[int, int], device: torch.device) -> tuple[Rotation, Rotation]:
    """U and V for a weight of shape `(out, in)`; the same for the same seed, whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return Rotation(shape[0], generator, device), Rotation(shape[1], generator, device)


def haar(n: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix, `[n, n]`, float64: QR of a normal one, made unique by the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation
