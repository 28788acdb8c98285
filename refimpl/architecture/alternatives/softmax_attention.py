r"""Softmax attention as a sequence mixer: what the others are held against, and a mixer whose state grows.

Source: `transformer` (arXiv 1706.03762), Section 3.2, with rotary positions (`rope`, arXiv 2104.09864).

Differs from the paper: no biases, rotary positions in the place of sinusoids.

Not here: grouped heads, windows; a decoder made of attention is `refimpl.model`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.architecture.alternatives.protocol import Mixer, linear
from refimpl.model.config import Rope
from refimpl.model.rope import inverse_frequencies, rotate


@dataclass(frozen=True, kw_only=True)
class SoftmaxAttention:
    """Causal multi-head attention.

    Args:
        head_dim: size of a head, even; divides the width, which gives the number of heads.
    """

    head_dim: int = 32

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2: rotary positions turn pairs")

    def build(self, d_model: int, generator: torch.Generator | None = None) -> "SoftmaxAttentionMixer":
        """The layer.

        Raises:
            ValueError: `head_dim` does not divide `d_model`.
        """
        if d_model % self.head_dim:
            raise ValueError(f"d_model={d_model} must be a multiple of head_dim={self.head_dim}")
        return SoftmaxAttentionMixer(d_model, self.head_dim, generator)


class SoftmaxAttentionMixer(Mixer):
    """The layer; its state is keys, rotated, and values, `[batch, heads, time, head_dim]` each."""

    constant_state = False

    def __init__(self, d_model: int, head_dim: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.d_model, self.head_dim = d_model, head_dim
        self.qkv_proj = linear(d_model, 3 * d_model, generator)
        self.out_proj = linear(d_model, d_model, generator)
        self.frequencies = inverse_frequencies(Rope(), head_dim, 0)  # no parameter: float32 in any model

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """No keys and no values."""
        empty = self.out_proj.weight.new_zeros(batch, self.d_model // self.head_dim, 0, self.head_dim)
        return empty, empty

    def extend(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Mixer.extend`."""
        self.check(x)
        past, time = state[0].shape[2], x.shape[1]
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        angles = torch.arange(past, past + time, device=x.device)[:, None] * self.frequencies.to(x.device)
        cos, sin = angles.cos(), angles.sin()
        turn = torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)
        keys, values = torch.cat((state[0], rotate(k, *turn)), dim=2), torch.cat((state[1], v), dim=2)
        mask = None if not past or time == 1 else torch.ones(time, past + time, device=x.device).tril(past).bool()
        out = F.scaled_dot_product_attention(
            rotate(q, *turn), keys, values, attn_mask=mask, is_causal=mask is None and time > 1
        )
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y, (keys, values)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Mixer.step`."""
        y, state = self.extend(x[:, None], state)
        return y[:, 0], state
