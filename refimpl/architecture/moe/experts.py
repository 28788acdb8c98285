r"""Many feed-forward networks of one shape, each run on the tokens that were sent to it.

Source: `switch-transformer` (arXiv 2101.03961), Section 2.1, Eq. (2) and Figure 2; official code
tensorflow/mesh@3016312539d3dce705642fd7aaeeb33a8b7044f9, mesh_tensorflow/transformer/moe.py, `transformer_moe_layer_v1`.

Differs from the paper: tokens are brought to their experts by index, where the official code multiplies with one-hot matrices
for the TPU; experts run one after the other, each once on all of its tokens, so that places nobody took cost nothing, where the
official code computes them too.

Not here: who is sent where (`MoE.route`), experts on several devices (`architecture/moe/system_level`), dropout.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["swiglu", "relu"]


class Experts(nn.Module):
    r"""$E$ networks: $W_{down}(\operatorname{silu}(W_{gate}x) \odot W_{up}x)$, or $W_{down}\operatorname{relu}(W_{up}x)$.

    Weights are truncated normal, $\sigma = \sqrt{s/in}$, cut at $2\sigma$ (Section 2.4).

    Args:
        n_experts: $E$.
        d_model: width of a token.
        d_ff: width inside an expert.
        activation: swiglu is the substrate's feed-forward, relu that of T5 and of the paper.
        generator: source of the weights; None is PyTorch's own.
        scale: $s$; the paper's is 0.1.
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation = "swiglu",
        generator: torch.Generator | None = None,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in {"n_experts": n_experts, "d_model": d_model, "d_ff": d_ff}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if activation not in ("swiglu", "relu"):
            raise ValueError(f"activation={activation!r} must be 'swiglu' or 'relu'")
        self.n_experts = n_experts
        # In the order in which `feed_forward` takes them.
        self.up_proj = draw((n_experts, d_ff, d_model), scale, generator)  # [E, out, in]
        self.down_proj = draw((n_experts, d_model, d_ff), scale, generator)
        self.gate_proj = draw((n_experts, d_ff, d_model), scale, generator) if activation == "swiglu" else None

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """What each token's expert makes of it.

        Args:
            x: `[n, d_model]`, tokens; one that goes to several experts stands there several times.
            expert: `[n]`, whole numbers below `n_experts`.

        Returns:
            `[n, d_model]`.
        """
        load = torch.bincount(expert, minlength=self.n_experts).tolist()
        sent = torch.split(expert.argsort(), load)  # the tokens of each expert
        y = torch.zeros_like(x)
        for tokens, *weights in zip(sent, *(weight.unbind() for weight in self.parameters()), strict=True):
            if len(tokens):
                y.index_copy_(0, tokens, feed_forward(x[tokens], *weights).to(x.dtype))
        return y

    def one(self, x: Tensor, expert: int) -> Tensor:
        """One expert on some tokens, `[n, d_model]` to the same."""
        return feed_forward(x, *(weight[expert] for weight in self.parameters()))


def feed_forward(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
    """One network on `[n, d_model]`; weights `[out, in]`."""
    inner = x @ up.mT
    inner = F.relu(inner) if gate is None else F.silu(x @ gate.mT) * inner
    return inner @ down.mT


def draw(shape: tuple[int, ...], scale: float, generator: torch.Generator | None) -> nn.Parameter:
    r"""A truncated normal parameter, $\sigma = \sqrt{scale / in}$ with `in` the last size, nothing beyond $2\sigma$."""
    std = (scale / shape[-1]) ** 0.5
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator))
