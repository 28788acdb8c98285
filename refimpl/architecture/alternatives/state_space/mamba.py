r"""Mamba: a state-space layer whose step and maps follow from the token, so that it chooses what to remember.

Source: `mamba` (arXiv 2312.00752), Algorithm 2, Eqs. (2a), (2b) and (4), Sections 3.3 to 3.6; official code
state-spaces/mamba@52f57d66f8d6d02a73b1e38f5f3708eb8ccfa39c, mamba_ssm/modules/mamba_simple.py.

Differs from the paper: $\bar B = \Delta B$, Euler's rule, where Eq. (4) has zero-order hold for both, and first steps that are
uniform on a logarithmic scale, where Section 3.6 has them uniform: both as in the official code. The scan is plain PyTorch
(`selective_scan.py`) where the paper has one fused kernel; for the gradient only its states are computed again, and not the
convolution and the activations too (Appendix D). The decoder's state holds the convolution's three last inputs, where the
official code holds four, and $h$ is float32 at least.

Comes trained: `mamba.safetensors`, from random weights on the testbed's rows, 2,600 steps of 8,192 tokens, for the arena long-context
(`python -m tools.mixers mamba`).

Not here: biases of the projections in and out, complex $A$, the optional normalization inside the block (Section 3.4; the
official code has none), gradients of gradients, left padding.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.alternatives.checkpoint import read_checkpoint
from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig
from refimpl.architecture.alternatives.protocol import Mixer, blank, linear
from refimpl.architecture.alternatives.state_space.selective_scan import selective_scan

DT_FLOOR = 1e-4  # least step at the start


@dataclass(frozen=True, kw_only=True)
class Mamba:
    r"""The settings of a layer.

    Args:
        d_state: $N$, numbers of state for each channel.
        d_conv: width of the causal convolution, in positions.
        expand: $E$, channels for one of the model's width.
        dt_rank: rank of the projection to $\Delta$; None is the width divided by 16, rounded up.
        dt_min: least step $\Delta$ at the start, without what the input adds.
        dt_max: largest.

    Examples:
        >>> mixer = Mamba().build(8, torch.Generator().manual_seed(0))
        >>> mixer(torch.ones(1, 5, 8)).shape, mixer.initial_state(1).ssm.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 16, 16]))
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand", "dt_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} and dt_max={self.dt_max} must be 0 < dt_min <= dt_max")

    def build(self, d_model: int, generator: torch.Generator | None = None) -> "MambaMixer":
        """The layer, its weights drawn as the official code draws them."""
        if d_model < 1:
            raise ValueError(f"d_model={d_model} must be at least 1")
        return MambaMixer(d_model, self, generator)

    def language_model(self, shape: LanguageModelConfig, generator: torch.Generator | None = None) -> LanguageModel:
        """Layers of nothing but this, drawn as the official code draws them."""
        return LanguageModel(shape, lambda _: self.build(shape.d_model, generator)).initialize(generator)


class State(NamedTuple):
    """What a decoder keeps.

    Attributes:
        conv: `[batch, channels, d_conv - 1]`, the last inputs of the convolution, the newest at the end.
        ssm: `[batch, channels, d_state]`, $h$.
    """

    conv: Tensor
    ssm: Tensor


class MambaMixer(Mixer):
    """The layer (Figure 3, right): widen, convolve, select and scan, gate, narrow. Names are the checkpoints'."""

    def __init__(self, d_model: int, config: Mamba, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        channels, rank = config.expand * d_model, config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = linear(d_model, 2 * channels, generator)
        self.conv1d = blank(nn.Conv1d(channels, channels, config.d_conv, groups=channels, device="meta"))
        self.x_proj = linear(channels, rank + 2 * config.d_state, generator)
        self.dt_proj = linear(rank, channels, generator, bias=True)
        self.out_proj = linear(channels, d_model, generator)
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(channels, 1))  # S4D-Real
        self.D = nn.Parameter(torch.ones(channels))
        for parameter in self.conv1d.parameters():
            nn.init.uniform_(parameter, -(config.d_conv**-0.5), config.d_conv**-0.5, generator=generator)
        draw = torch.empty(channels, device=self.D.device).uniform_(generator=generator)
        dt = (math.log(config.dt_min) + draw * math.log(config.dt_max / config.dt_min)).exp().clamp(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + (-torch.expm1(-dt)).log())  # softplus of it is dt

    def initial_state(self, batch: int) -> State:
        """Zeros."""
        wide = torch.promote_types(self.D.dtype, torch.float32)
        return State(
            self.in_proj.weight.new_zeros(batch, len(self.D), self.config.d_conv - 1),
            self.D.new_zeros(*(batch, *self.A_log.shape), dtype=wide),
        )

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        self.check(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        window = torch.cat((state.conv, u.transpose(1, 2)), dim=-1)  # [b, channels, d_conv - 1 + t]
        u = F.silu(self.conv1d(window)).transpose(1, 2)
        y, ssm = selective_scan(u, *self.selected(u), state.ssm)
        return self.gated(y, u, z), State(window[..., x.shape[1] :].clone(), ssm)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        window = torch.cat((state.conv, u.unsqueeze(-1)), dim=-1)  # [b, channels, d_conv]
        u = F.silu(self.conv1d(window)).squeeze(-1)
        delta, A, B, C = self.selected(u)
        ssm = (delta.unsqueeze(-1) * A).exp() * state.ssm + (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
        return self.gated((ssm @ C.unsqueeze(-1)).squeeze(-1), u, z), State(window[..., 1:].clone(), ssm)

    def selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""What the scan takes (Algorithm 2, lines 1 to 4), float32 at least.

        Args:
            u: `[..., channels]`, inputs of the scan.

        Returns:
            $\Delta$ `[..., channels]`, $A$ `[channels, d_state]`, $B$ and $C$ `[..., d_state]`.
        """
        n, wide = self.config.d_state, torch.promote_types(u.dtype, torch.float32)
        low, B, C = self.x_proj(u).split((self.dt_proj.in_features, n, n), dim=-1)
        delta = F.softplus(F.linear(low, self.dt_proj.weight).to(wide) + self.dt_proj.bias)
        return delta, -self.A_log.to(wide).exp(), B.to(wide), C.to(wide)

    def gated(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Output from the scan's output, its input and the gate, `[..., d_model]`."""
        out: Tensor = self.out_proj(((y + self.D.to(y.dtype) * u) * F.silu(z)).to(z.dtype))
        return out


def load(path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """A Mamba language model from a local folder in Hugging Face's layout, in evaluation mode.

    Args:
        path: folder with config.json (`MambaForCausalLM`) and safetensors.
        dtype: of all parameters; None keeps the stored one.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: another architecture, a setting that is not supported, or tensors that do not fit.
    """
    given, tensors = read_checkpoint(
        path,
        "MambaForCausalLM",
        plain={
            "hidden_act": ("silu", "swish"),
            "use_bias": (False,),
            "use_conv_bias": (True,),
            "residual_in_fp32": (True,),
        },
        renames={"backbone.embeddings.": "embedding.", "backbone.norm_f.": "norm.", "backbone.": ""},
    )
    rank = given.get("time_step_rank", "auto")
    config = Mamba(
        d_state=given.get("state_size", 16),
        d_conv=given.get("conv_kernel", 4),
        expand=given.get("expand", 2),
        dt_rank=None if rank == "auto" else rank,
    )
    shape = LanguageModelConfig(
        vocabulary=given.get("vocab_size", 50280),
        d_model=given.get("hidden_size", 768),
        n_layers=given.get("num_hidden_layers", 32),
        norm_eps=given.get("layer_norm_epsilon", 1e-5),
        tied_embeddings=given.get("tie_word_embeddings", True),
    )
    with torch.device("meta"):
        model = LanguageModel(shape, lambda _: config.build(shape.d_model))
    return model.assign(tensors, dtype, source=path)
