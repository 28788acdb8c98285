r"""RoPE: turn pairs of a query's and a key's coordinates by angles proportional to the position.

Source: `rope` (arXiv 2104.09864), Eqs. (12), (15), (16), (34), Sections 3.3 and 3.4.3 with Eqs. (35)-(37); official code
ZhuiyiTechnology/roformer@1ad4f17518adc5740fb1748e4e726baa11879254, README.md.

Differs from the paper: `install` pairs coordinate i with i + head_dim / 2 (half-split), as `refimpl.model` and today's
checkpoints do; the paper pairs neighbours (`layout="interleaved"` of `rope`). `interleaved_to_half_split` moves weights
from one to the other, and the scores are then the same.

Not here: scaled frequencies (`position_interpolation`, `ntk_rope`, `yarn`, `clex`); partial rotation; the linear attention
of Section 3.3. Pairs are turned by `refimpl.model.rope`, which serves loaded checkpoints too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from refimpl.architecture.long_context.positions.protocol import Positions, RotaryFunction
from refimpl.model.config import Config
from refimpl.model.rope import Rotation, geometric, rotate

Layout = Literal["half-split", "interleaved"]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class RoPE(Positions):
    r"""Rotary position embedding.

    Args:
        base: of the frequencies $\theta_i = \mathrm{base}^{-2i/d}$, above 1; the paper's 10000.

    Examples:
        >>> config = Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8)
        >>> cos, sin = RoPE().rotary(config)(torch.tensor([[0, 1]]), torch.float32)
        >>> cos.shape, cos[0, 0, 0].tolist(), sin[0, 0, 0].tolist()  # position 0 stays as it is
        (torch.Size([1, 1, 2, 4]), [1.0, 1.0, 1.0, 1.0], [-0.0, -0.0, 0.0, 0.0])
    """

    relative: ClassVar[bool] = True

    base: float = 10000.0

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise ValueError(f"base={self.base} must be above 1; the paper's is 10000")

    def rotary(self, config: Config, generator: torch.Generator | None = None) -> RotaryFunction:  # noqa: ARG002
        """The rotation as a decoder applies it to queries and keys, angles in float32; nothing is drawn."""
        return Rotation(frequencies(config.head_dim, self.base))


def rope(x: Tensor, positions: Tensor, base: float = 10000.0, layout: Layout = "half-split") -> Tensor:
    r"""Turn each pair of coordinates at position $m$ by $m\theta_i$: as complex numbers, $x_i e^{\mathrm{i} m\theta_i}$ (Eq. 12).

    Args:
        x: `[batch, heads, time, dim]`, queries or keys, dim even.
        positions: `[time]` or `[batch, time]`; after a past of n tokens they begin with n.
        base: of the frequencies.
        layout: which coordinates are pair i: i and i + dim / 2, or 2i and 2i + 1 (the paper's).

    Returns:
        x's shape and dtype. Angles are float32 (float64 for x of float64), cosines and sines are rounded to x's dtype.

    Raises:
        ValueError: shapes do not fit, an odd dim, or a layout that is not one.

    Examples:
        >>> x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)
        >>> rope(x, torch.tensor([0])).flatten().tolist()
        [1.0, 2.0, 0.0, 0.0]
        >>> [round(t, 3) for t in rope(x, torch.tensor([1])).flatten().tolist()]  # pair (1, 0) by 1, pair (2, 0) by 0.01
        [0.54, 2.0, 0.841, 0.02]
    """
    if x.ndim != 4 or positions.ndim not in (1, 2) or positions.shape[-1] != x.shape[2]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} must be [batch, heads, time, dim], positions of {tuple(positions.shape)} "
            "[time] or [batch, time]"
        )
    if layout not in ("half-split", "interleaved"):
        raise ValueError(f"layout={layout!r} must be 'half-split' or 'interleaved'")
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotation = Rotation(frequencies(x.shape[3], base, dtype).to(x.device))
    cos, sin = rotation(positions if positions.ndim == 2 else positions.unsqueeze(0), x.dtype)
    if layout == "half-split":
        return rotate(x, cos, sin)
    half = x.shape[3] // 2
    return rotate_neighbours(x, cos[..., :half], sin[..., half:])


def frequencies(dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Radians a token by which pair i turns, $\theta_i = \mathrm{base}^{-2i/d}$, $i = 0, \dots, d/2 - 1$ (Eq. 15 counts from 1).

    Args:
        dim: $d$, even.
        base: 10000 in the paper.
        dtype: of the result.

    Returns:
        `[dim / 2]`, from 1 down to nearly 1 / base.

    Raises:
        ValueError: an odd dim, or a base of 1 or below.

    Examples:
        >>> frequencies(4, 100.0, torch.float64).tolist()
        [1.0, 0.1]
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} must be even and at least 2: rotary positions turn pairs")
    if base <= 1:
        raise ValueError(f"base={base} must be above 1; the paper's is 10000")
    return geometric(base, dim, dtype, CPU)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Turn the pairs $(x_{2i}, x_{2i+1})$, the interleaved layout, in the efficient form of Eq. (34).

    Args:
        x: `[batch, heads, time, dim]`.
        cos: `[batch or 1, 1, time, dim / 2]`.
        sin: the same shape.

    Returns:
        x's shape and dtype.

    Examples:
        >>> rotate_neighbours(torch.tensor([3.0, 4.0]), torch.tensor([0.0]), torch.tensor([1.0])).tolist()  # a quarter turn
        [-4.0, 3.0]
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def interleaved_to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection, so that the half-split layout gives the interleaved one's scores.

    Args:
        weight: `[heads * head_dim, ...]`: a projection's weight or bias, or a norm of queries or keys; left unchanged.
        head_dim: even.

    Returns:
        weight's shape: within each head first the rows with even index, then those with odd.

    Raises:
        ValueError: rows that are no whole heads.

    Examples:
        >>> interleaved_to_half_split(torch.arange(8), 4).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    _check_rows(weight, head_dim)
    return weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def half_split_to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """The way back from `interleaved_to_half_split`; same arguments, result and errors.

    Examples:
        >>> half_split_to_interleaved(torch.tensor([0, 2, 1, 3]), 4).tolist()
        [0, 1, 2, 3]
    """
    _check_rows(weight, head_dim)
    return weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def decay_bound(distances: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    r"""What bounds a score at a distance, up to a factor of query and key: $\frac{2}{d} \sum_{j=1}^{d/2} |S_j|$ (Figure 2).

    $S_j = \sum_{i<j} e^{\mathrm{i}(m-n)\theta_i}$; the score of q and k is at most $\max_i |h_{i+1} - h_i| \sum_j |S_j|$ (Eq. 37),
    with $h_i = q_{[i]} k_{[i]}^*$ the product of their i-th pairs as complex numbers and $h_{d/2} = 0$.

    Args:
        distances: $m - n$, any shape.
        dim: $d$, even.
        base: of the frequencies.

    Returns:
        distances' shape, float64.

    Examples:
        >>> decay_bound(torch.tensor([0]), 128).item()  # (1 + 2 + ... + 64) / 64
        32.5
    """
    angles = distances.double().unsqueeze(-1) * frequencies(dim, base, torch.float64).to(distances.device)
    return torch.polar(torch.ones_like(angles), angles).cumsum(dim=-1).abs().mean(dim=-1)


def _check_rows(weight: Tensor, head_dim: int) -> None:
    if weight.ndim < 1 or head_dim < 2 or head_dim % 2 or weight.shape[0] % head_dim:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must have a multiple of head_dim={head_dim} rows, head_dim even"
        )
