r"""What all mixtures of experts share: a layer in the place of a feed-forward, of which each token uses a part.

Glossary
    x           tokens, `[..., d_model]`; all leading axes are one list of n tokens, in order
    experts     $E$ or $N$, the feed-forward networks, see `experts.py`
    choices     the most experts that a token can be sent to: k of a top-k router
    gate        $p_i(x)$, factor of the expert's output
    capacity    tokens that an expert takes; what comes after them is not served
    dropped     a token that no expert serves: the layer's output is zero, and the residual alone passes it on
    auxiliary   loss that training adds to the task's, to keep the loads even

A method is a configuration whose `build` makes the layer, and the layer says where tokens go (`MoE.route`); what is done with
them is the same for all:

Examples:
    >>> from refimpl.architecture.moe.models.switch import Switch
    >>> layer = Switch(n_experts=4).build(8, 16, torch.Generator().manual_seed(0)).eval()
    >>> y, auxiliary, routing = layer(torch.ones(2, 3, 8))
    >>> y.shape, routing.expert.shape, int(routing.load.sum()), routing.dropped.tolist()
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 1]), 4, [[False, False, False], [False, True, True]])

How it stands in a decoder: `decoder.py`.

Invariants, run for every method by `tests/architecture/moe/test_protocol.py`: the output is what the routing says, expert by
expert; loads count what is served; a token that is dropped comes out as zero; a permutation of the tokens permutes the outputs
where nothing is dropped; gradients reach the router and the experts that were used, and no others.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from refimpl.architecture.moe.experts import Activation, Experts


class Routing(NamedTuple):
    """Where tokens went.

    Attributes:
        expert: `[..., choices]`, the expert of each choice.
        gate: `[..., choices]`, the factor of its output, float32 at least; 0 where nothing was chosen.
        served: `[..., choices]`, whether the expert took the token.
        load: `[experts]`, tokens that each expert took.
    """

    expert: Tensor
    gate: Tensor
    served: Tensor
    load: Tensor

    @property
    def dropped(self) -> Tensor:
        """Tokens that no expert took, `[...]`."""
        return ~self.served.any(dim=-1)

    @property
    def demand(self) -> Tensor:
        """Tokens that each expert was chosen by, `[experts]`, whether it took them or not."""
        return torch.bincount(self.expert[self.gate > 0], minlength=len(self.load))


class MoE(nn.Module, ABC):
    """The layer: `route` is the method."""

    experts: Experts

    @abstractmethod
    def route(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose experts for tokens `[n, d_model]`.

        Returns:
            `expert`, `gate` and `served` as in `Routing`, `[n, choices]`, and the auxiliary loss, a float32 scalar that is
            multiplied with its factor.
        """

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Routing]:
        """Send tokens to experts and add up what comes back.

        Args:
            x: `[..., d_model]`, at least one token.
            generator: source of what training draws, on x's device; None is PyTorch's own.

        Returns:
            The output, in x's shape and dtype; the auxiliary loss, to be added to the task's; and the routing.

        Raises:
            ValueError: x has another width, or no token.
        """
        width = self.experts.down_proj.shape[1]
        if x.ndim < 1 or x.shape[-1] != width or x.numel() == 0:
            raise ValueError(f"x of shape {tuple(x.shape)} must be [..., {width}] with at least one token")
        tokens = x.reshape(-1, width)
        expert, gate, served, auxiliary = self.route(tokens, generator)
        token, choice = served.nonzero(as_tuple=True)
        out = self.experts(tokens[token], expert[token, choice]) * gate[token, choice, None].to(x.dtype)
        y = torch.zeros_like(tokens).index_add(0, token, out)
        load = torch.bincount(expert[token, choice], minlength=self.experts.n_experts)
        shape = (*x.shape[:-1], expert.shape[1])
        return y.view(x.shape), auxiliary, Routing(expert.view(shape), gate.view(shape), served.view(shape), load)


class MixtureOfExperts(Protocol):
    """A method: a frozen dataclass of settings."""

    def build(
        self, d_model: int, d_ff: int, generator: torch.Generator | None = None, *, activation: Activation = "swiglu"
    ) -> MoE:
        """A layer whose experts each have the shape of a dense feed-forward of these widths."""
        ...
