r"""What all sequence mixers share: layers that stand where attention stands, and carry the past in a state.

Glossary
    x           $u$ or $x$, input of the layer, `[batch, time, d_model]`; one position is `[batch, d_model]`
    y           the output, of x's shape and dtype
    state       all that the layer knows of the positions before: a tensor, or tuples of them, `[batch, ...]` each;
                what a decoder holds in the place of keys and values
    step        one position: what generation does
    extend      some positions at once, from a state to a state: what reading a prompt does, whole or in chunks

A method is a configuration whose `build` makes the layer, a module:

Examples:
    >>> import torch
    >>> from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
    >>> mixer = SoftmaxAttention(head_dim=4).build(8, torch.Generator().manual_seed(0))
    >>> x, state = torch.ones(1, 3, 8), mixer.initial_state(1)
    >>> y = mixer(x)
    >>> first, state = mixer.extend(x[:, :2], state)
    >>> last, state = mixer.step(x[:, 2], state)
    >>> torch.allclose(y, torch.cat((first, last[:, None]), dim=1)), state_bytes(state)
    (True, 192)

Invariants, run for every method by `tests/architecture/alternatives/test_protocol.py`: forward, steps and chunks agree over
a thousand positions and more; no output depends on later inputs; a batch equals its rows; the state's bytes do not grow
where `constant_state` says so, and do where it does not; states and inputs are never written, so that a state can be kept
and gone back to; gradients reach every parameter; outputs have x's dtype, length 1 works; a seed gives the same layer.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

State = Any  # a tensor, or nested tuples of tensors; only the layer itself looks inside


class Mixer(nn.Module, ABC):
    """A layer: `forward`, `extend` and `step` compute the same function."""

    constant_state: ClassVar[bool] = True  # whether the state has the same size after every position
    d_model: int

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """The state before the first position, in the parameters' device."""

    @abstractmethod
    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs `[batch, time, d_model]` of positions that follow `state`, and the state after them.

        Raises:
            ValueError: x is not `[batch, time, d_model]` with at least one position.
        """

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output `[batch, d_model]` of one position, and the state after it; `state` is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a whole sequence, `[batch, time, d_model]`, nothing before it."""
        self.check(x)
        return self.extend(x, self.initial_state(len(x)))[0]

    def check(self, x: Tensor) -> None:
        """Refuse what is no `[batch, time, d_model]` with at least one position."""
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ValueError(f"x of shape {tuple(x.shape)} must be [batch, time, {self.d_model}], none of them 0")


class SequenceMixer(Protocol):
    """A method: a frozen dataclass of settings."""

    def build(self, d_model: int, generator: torch.Generator | None = None) -> Mixer:
        """A layer of that width, its weights drawn as the paper draws them; None is PyTorch's own source."""
        ...


def state_bytes(state: State) -> int:
    """Bytes that a state holds.

    Examples:
        >>> state_bytes((torch.zeros(2, 3), (torch.zeros(4, dtype=torch.bfloat16),)))
        32
    """
    return state.nbytes if isinstance(state, Tensor) else sum(state_bytes(part) for part in state)


def linear(inputs: int, outputs: int, generator: torch.Generator | None, bias: bool = False) -> nn.Linear:
    r"""A linear layer, weight and bias uniform in $\pm 1/\sqrt{in}$ as PyTorch draws them, but from `generator`."""
    layer = blank(nn.Linear(inputs, outputs, bias=bias, device="meta"))
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def blank(module: M) -> M:
    """A module that was made on `meta`, with room for its parameters on the default device and nothing drawn."""
    return module.to_empty(device=torch.get_default_device())
