r"""What all methods share that train one model on several processes.

Glossary
    group        the processes, `refimpl.distributed.Group`: this one is `rank` of `size` ($N$)
    inputs       `[rows, …]`, the batch of the whole group, the same tensor on every rank; the method takes its part
    targets      `[rows, …]`, likewise
    loss         `loss(outputs, targets)`, a mean over rows
    optimizer    `optimizer(parameters)` makes a `torch.optim.Optimizer`, for example `partial(AdamW, lr=1e-3)`
    held         bytes on this rank: parameters, gradients, optimizer states, each in its own count

A method is a configuration; calling it on every rank with the same model gives this rank's run. Programs are started by
`refimpl.processes.launch` or by torchrun (`with joined() as group:`).

Examples:
    >>> from functools import partial
    >>> from torch.optim import AdamW
    >>> from refimpl.pretraining.system_level.data_parallel import DataParallel
    >>> def program(group):
    ...     model = nn.Linear(3, 2)
    ...     run = DataParallel()(model, partial(AdamW, lr=1e-3), nn.functional.mse_loss, group)
    ...     run.step(torch.ones(4, 3), torch.zeros(4, 2))
    ...     return run.whole()

Invariants, run for every method by `tests/pretraining/system_level/test_protocol.py`: after some steps `whole()` equals one
process that trained on the same batches, to rounding, for 1, 2 and 3 ranks; all ranks have the same; a batch whose rows the
ranks can't share equally counts each row once; bytes held are those of the tensors that live; `close()` leaves a plain model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refimpl.distributed import Group

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


class Held(NamedTuple):
    """Bytes on one rank between two steps; gradients as they are at the end of the backward pass."""

    parameters: int
    gradients: int
    states: int


class Run(ABC):
    """One rank's part of a training.

    `held` is known after the first step. `peak` is the most that lived for a moment beyond it: gathered parameters, whole
    gradients on their way to becoming parts, tensors that are sent and received.
    """

    held: Held
    peak: int = 0

    def __init__(self, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self.loss, self.group = model, loss, group

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update on the group's batch, called on every rank; returns the batch's loss, the same on all.

        Raises:
            ValueError: the batch has too few rows for all ranks, or inputs and targets differ in rows.
        """

    @abstractmethod
    def whole(self) -> dict[str, Tensor]:
        """Copies of all parameters, by name, called on every rank."""

    @abstractmethod
    def close(self) -> nn.Module:
        """Give the model its parameters back, called on every rank; the run is over."""


class Parallel(ABC):
    """A method: a frozen dataclass of settings that is called on every rank."""

    @abstractmethod
    def __call__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group) -> Run:
        """Take over the training of a model, whose parameters become rank 0's everywhere."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors, each piece once, however many of them look at it.

    Examples:
        >>> x = torch.zeros(10)
        >>> bytes_of([x, x[2:4], torch.zeros(1).expand(100)])
        44
    """
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors that an optimizer keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
