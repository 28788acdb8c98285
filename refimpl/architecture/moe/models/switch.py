r"""Switch Transformer: one expert for each token, a fixed capacity, and a loss that keeps the loads even.

Source: `switch-transformer` (arXiv 2101.03961), Eqs. (1) to (6), Sections 2.1 to 2.4, Appendix F; official code
tensorflow/mesh@3016312539d3dce705642fd7aaeeb33a8b7044f9, mesh_tensorflow/transformer/moe.py, `_switch_gating`,
`transformer_moe_layer_v1`, `_split_into_groups`.

Differs from the paper: noise is a factor of the router's input, as in Appendix C and the official code, where the pseudo code of
Appendix F adds it to the logits; at least 4 places an expert, groups of tokens, and the rounding down of the capacity are the
official code's, but for tokens that have no equal division near the group's size, which are one group here. The auxiliary
loss stays float32, where the official code casts it to the input's dtype.

Not here: dropout inside experts, the router's z-loss (a later paper's), padding tokens, other ways to explore (sampling,
dropout of the input).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.architecture.moe.experts import Activation, Experts, draw
from refimpl.architecture.moe.protocol import MoE

MIN_CAPACITY = 4  # places of an expert, whatever the capacity factor says
INIT_SCALE = 0.1  # of the weights' variance times their inputs, a tenth of the usual one (Section 2.4)


@dataclass(frozen=True, kw_only=True)
class Switch:
    r"""The settings of a layer.

    Args:
        n_experts: $N$; the official code's default.
        capacity_factor: places of all experts for one token, in training.
        eval_capacity_factor: the same, otherwise.
        alpha: $\alpha$, factor of the auxiliary loss.
        jitter: $\epsilon$; in training the router's input is multiplied by numbers from $1 - \epsilon$ to $1 + \epsilon$.
        group_size: tokens whose places are counted together, about; the official code's default.

    Examples:
        >>> layer = Switch(n_experts=4).build(8, 16, torch.Generator().manual_seed(0))
        >>> layer.experts.up_proj.shape, layer.router.shape
        (torch.Size([4, 16, 8]), torch.Size([4, 8]))
    """

    n_experts: int = 16
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    alpha: float = 0.01
    jitter: float = 0.01
    group_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("n_experts", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("capacity_factor", "eval_capacity_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0; the paper uses 1.0 to 2.0")
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha} must not be negative; the paper uses 0.01")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter} must be 0 or above, and below 1")

    def build(
        self, d_model: int, d_ff: int, generator: torch.Generator | None = None, *, activation: Activation = "swiglu"
    ) -> "SwitchLayer":
        """The layer, its weights drawn with the paper's small scale."""
        return SwitchLayer(d_model, d_ff, self, activation, generator)


class SwitchLayer(MoE):
    """The layer; `router` is $W_r$, `[experts, d_model]`."""

    def __init__(
        self, d_model: int, d_ff: int, config: Switch, activation: Activation, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = Experts(
            config.n_experts, d_model, d_ff, activation=activation, generator=generator, scale=INIT_SCALE
        )
        self.router = draw((config.n_experts, d_model), INIT_SCALE, generator)

    def route(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `MoE.route`; float32 at least, whatever x is (Section 2.4, selective precision)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = x.to(wide)
        if self.training and self.config.jitter:
            low, high = 1 - self.config.jitter, 1 + self.config.jitter
            inputs = inputs * torch.empty_like(inputs).uniform_(low, high, generator=generator)
        probabilities = F.linear(inputs, self.router.to(wide)).softmax(dim=-1)  # Eq. (1)
        grouped = probabilities.view(
            groups(len(x), self.config.group_size), -1, self.config.n_experts
        )  # [groups, tokens, N]
        gate, expert = grouped.max(dim=-1)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        served = places(expert, self.config.n_experts) < capacity(grouped.shape[1], self.config.n_experts, factor)
        auxiliary = self.config.alpha * load_balancing_loss(grouped, expert)
        return expert.view(-1, 1), gate.view(-1, 1), served.view(-1, 1), auxiliary


def load_balancing_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
    r"""$N \sum_i f_i P_i$ (Eqs. 4 to 6), the mean over groups; the caller multiplies by $\alpha$.

    Args:
        probabilities: `[groups, tokens, N]`, of the router.
        expert: `[groups, tokens]`, the chosen ones, before any is dropped.

    Returns:
        A scalar: 1 when choices and probabilities are uniform, up to $N$ when all choose one expert for certain.

    Examples:
        >>> sure = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> load_balancing_loss(sure, torch.zeros(1, 2, dtype=torch.long)).item()
        2.0
    """
    n = probabilities.shape[-1]
    f = F.one_hot(expert, n).to(probabilities.dtype).mean(dim=1)
    return n * (f * probabilities.mean(dim=1)).sum(dim=-1).mean()


def capacity(tokens: int, n_experts: int, factor: float) -> int:
    r"""Places of an expert in a group, $\lfloor tokens \cdot factor / N \rfloor$ (Eq. 3), at most the group, at least 4.

    Examples:
        >>> capacity(1024, 16, 1.25), capacity(100, 16, 1.25), capacity(8, 16, 1.25)
        (80, 7, 4)
    """
    return max(min(tokens, int(tokens * factor / n_experts)), MIN_CAPACITY)


def places(expert: Tensor, n_experts: int) -> Tensor:
    """How many tokens of the group came to the same expert before each, `[groups, tokens]` to the same.

    Examples:
        >>> places(torch.tensor([[2, 0, 2, 2]]), 3).tolist()
        [[0, 0, 1, 2]]
    """
    came = F.one_hot(expert, n_experts).cumsum(dim=1)
    return came.gather(-1, expert.unsqueeze(-1)).squeeze(-1) - 1


def groups(tokens: int, size: int) -> int:
    """The number of equal groups: those of `size` tokens that fit, and more until it divides all tokens.

    One group where these would be smaller than half that size: the loss of a group of one token balances nothing.

    Examples:
        >>> groups(4096, 1024), groups(2050, 1024), groups(2049, 1024), groups(2053, 1024)
        (4, 2, 3, 1)
    """
    n = max(1, tokens // size)
    while tokens % n:
        n += 1
    return n if 2 * tokens >= n * size else 1
