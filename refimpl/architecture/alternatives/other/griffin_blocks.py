r"""The blocks that Griffin is made of: recurrent, local attention, gated feed-forward; and their normalization.

Source: `griffin` (arXiv 2402.19427), Sections 2.1 to 2.4; official code
google-deepmind/recurrentgemma@2efa84dac0e68e63547a27a18fa943c98f1c312e, recurrentgemma/torch/modules.py and layers.py.
Parameters have the names of Hugging Face's checkpoints.

Differs from the paper: the decoder's state says itself whether the text has begun, where the official code is told positions.

Not here: several texts in a row of tokens, more heads of keys and values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.alternatives.other.local_attention import local_attention, rotate_first_half
from refimpl.architecture.alternatives.other.rg_lru import decay_and_input, rg_lru
from refimpl.architecture.alternatives.protocol import Mixer, blank

LEAST, LARGEST = 0.9, 0.999  # decays $a$ at the start
CONVOLUTION = 0.01  # variance of the convolution's weights, times its width


class RecurrentState(NamedTuple):
    """What a decoder keeps of a recurrent block.

    Attributes:
        conv: `[batch, channels, d_conv - 1]`, the last inputs of the convolution, the newest at the end.
        hidden: `[batch, channels]`, $h$, float32 at least.
        begun: `[]`, whether a position was seen.
    """

    conv: Tensor
    hidden: Tensor
    begun: Tensor


class RecurrentBlock(Mixer):
    """A convolution and an RG-LRU on one branch, GeLU on the other, multiplied (Figure 2c)."""

    def __init__(
        self, d_model: int, channels: int, n_heads: int, d_conv: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        if channels % n_heads:
            raise ValueError(f"lru_width={channels} must be a multiple of n_heads={n_heads}")
        self.d_model = d_model
        self.linear_x, self.linear_y = (normal(d_model, channels, generator) for _ in range(2))
        self.linear_out = normal(channels, d_model, generator)
        self.conv_1d = blank(nn.Conv1d(channels, channels, d_conv, groups=channels, device="meta"))
        nn.init.normal_(self.conv_1d.weight, std=(CONVOLUTION / d_conv) ** 0.5, generator=generator)
        nn.init.zeros_(self.conv_1d.bias)  # type: ignore[arg-type]
        size = channels // n_heads
        self.recurrent_gate_weight, self.input_gate_weight = (
            nn.Parameter(torch.empty(n_heads, size, size).normal_(std=size**-0.5, generator=generator))
            for _ in range(2)
        )
        self.recurrent_gate_bias, self.input_gate_bias = (nn.Parameter(torch.zeros(n_heads, size)) for _ in range(2))
        squared = torch.empty(channels).uniform_(LEAST**2, LARGEST**2, generator=generator)
        self.recurrent_param = nn.Parameter((squared.rsqrt() - 1).log())  # softplus of it is -ln a

    def initial_state(self, batch: int) -> RecurrentState:
        """Zeros; nothing was seen."""
        wide = torch.promote_types(self.recurrent_param.dtype, torch.float32)
        channels, _, width = self.conv_1d.weight.shape
        return RecurrentState(
            self.conv_1d.weight.new_zeros(batch, channels, width - 1),
            self.recurrent_param.new_zeros(batch, channels, dtype=wide),
            torch.zeros((), dtype=torch.bool, device=self.recurrent_param.device),
        )

    def extend(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """See `Mixer.extend`."""
        self.check(x)
        u, conv = self.convolved(self.linear_x(x), state.conv)
        reset = None if state.begun else torch.arange(x.shape[1], device=x.device)[None] == 0
        h, hidden = rg_lru(u, *self.gates(u), self.recurrent_param, state.hidden, reset)
        return self.joined(h, x), RecurrentState(conv, hidden, torch.ones_like(state.begun))

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """See `Mixer.step`."""
        u, conv = self.convolved(self.linear_x(x).unsqueeze(1), state.conv)
        u = u.squeeze(1)
        reset = None if state.begun else torch.ones(1, dtype=torch.bool, device=x.device)
        a, b = decay_and_input(u, *self.gates(u), self.recurrent_param, reset, state.hidden.dtype)
        hidden = a * state.hidden + b
        return self.joined(hidden, x), RecurrentState(conv, hidden, torch.ones_like(state.begun))

    def convolved(self, u: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution over `[batch, time, channels]` after its past inputs, and the inputs to keep."""
        window = torch.cat((past.to(u.dtype), u.transpose(1, 2)), dim=-1)
        if u.shape[1] == 1:  # a few products, for which a convolution's setting up would take longer
            out = (window * self.conv_1d.weight[:, 0]).sum(dim=-1, keepdim=True) + self.conv_1d.bias.unsqueeze(-1)  # type: ignore[union-attr]
        else:
            out = self.conv_1d(window)
        return out.transpose(1, 2), window[..., u.shape[1] :].to(past.dtype, copy=True)

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """$r$ and $i$ (Eqs. 1 and 2), `[..., channels]`, their matrices in blocks on the diagonal."""
        blocks = u.reshape(-1, *self.input_gate_bias.shape).transpose(0, 1)  # [n_heads, positions, channels of a head]
        r, i = (
            torch.baddbmm(bias.unsqueeze(1), blocks, weight).transpose(0, 1).reshape(u.shape).sigmoid()
            for weight, bias in (
                (self.recurrent_gate_weight, self.recurrent_gate_bias),
                (self.input_gate_weight, self.input_gate_bias),
            )
        )
        return r, i

    def joined(self, h: Tensor, x: Tensor) -> Tensor:
        """Output from the recurrence's states and the block's input, `[..., d_model]`."""
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        out: Tensor = self.linear_out(h.to(gate.dtype) * gate)
        return out


class AttentionState(NamedTuple):
    """What a decoder keeps of an attention block, as many bytes before the first position as after the last.

    Attributes:
        keys: `[batch, window, head_dim]`, rotated, the newest at the end; places that no position has filled are 0.
        values: the same shape.
        seen: `[]`, positions seen.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor


class AttentionBlock(Mixer):
    """Attention over a window, one head of keys and values, rotary positions on half of a head (Section 2.3)."""

    def __init__(self, d_model: int, n_heads: int, window: int, generator: torch.Generator | None) -> None:
        super().__init__()
        if d_model % (4 * n_heads):
            raise ValueError(
                f"d_model={d_model} must be a multiple of 4 * n_heads={4 * n_heads}: half of a head turns in pairs"
            )
        self.d_model, self.n_heads, self.window = d_model, n_heads, window
        self.q_proj = normal(d_model, d_model, generator, bias=False)
        self.k_proj, self.v_proj = (normal(d_model, d_model // n_heads, generator, bias=False) for _ in range(2))
        self.o_proj = normal(d_model, d_model, generator)

    def initial_state(self, batch: int) -> AttentionState:
        """Room for a window, and no position."""
        keys = self.k_proj.weight.new_zeros(batch, self.window, self.d_model // self.n_heads)
        return AttentionState(keys, keys.clone(), torch.zeros((), dtype=torch.long, device=keys.device))

    def extend(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """See `Mixer.extend`."""
        self.check(x)
        time = x.shape[1]
        positions = state.seen + torch.arange(time, device=x.device)
        q = rotate_first_half(self.q_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2), positions)
        k, v = rotate_first_half(self.k_proj(x), positions), self.v_proj(x)
        held = min(int(state.seen), self.window)
        keys, values = (
            torch.cat((past[:, self.window - held :].to(new.dtype), new), dim=1) if held else new
            for past, new in ((state.keys, k), (state.values, v))
        )
        out: Tensor = self.o_proj(local_attention(q, keys, values, self.window).transpose(1, 2).flatten(2))
        state_keys, state_values = (
            torch.cat((past[:, time:], new[:, -self.window :].to(past.dtype)), dim=1)
            for past, new in ((state.keys, k), (state.values, v))
        )
        return out, AttentionState(state_keys, state_values, state.seen + time)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """See `Mixer.step`."""
        y, state = self.extend(x.unsqueeze(1), state)
        return y.squeeze(1), state


class GatedMLP(Mixer):
    """GeLU of one branch times the other, projected back (Figure 2b); it keeps no state."""

    def __init__(self, d_model: int, d_ff: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.d_model = d_model
        self.gate_proj, self.up_proj = (normal(d_model, d_ff, generator) for _ in range(2))
        self.down_proj = normal(d_ff, d_model, generator)

    def initial_state(self, batch: int) -> tuple[()]:  # noqa: ARG002 - there is nothing to keep of any row
        """Nothing."""
        return ()

    def extend(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """See `Mixer.extend`."""
        self.check(x)
        return self.step(x, state)

    def step(self, x: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """See `Mixer.step`."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)), state


class ZeroCentredRMSNorm(nn.Module):
    r"""$(1 + w) \odot x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$, in float32 at least up to the end.

    Examples:
        >>> ZeroCentredRMSNorm(2, 0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)


def normal(inputs: int, outputs: int, generator: torch.Generator | None, bias: bool = True) -> nn.Linear:
    """A linear layer, its weight normal with a variance of 1 / inputs, its bias 0."""
    layer = blank(nn.Linear(inputs, outputs, bias=bias, device="meta"))
    nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
