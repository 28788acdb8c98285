r"""Data parallelism: every rank holds everything, sees its own rows, and gradients are summed. What others are held against.

Source: `zero` (arXiv 1910.02054), Section 7.1, which describes it as the baseline: gradients of $\Psi$ parameters are
all-reduced, which moves $2\Psi$ numbers for each rank.

Differs from the paper: none.

Not here: buckets that are reduced during the backward pass (`zero` has them).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.distributed import Group
from refimpl.pretraining.system_level.protocol import Factory, Held, Loss, Parallel, Run, bytes_of, state_tensors


@dataclass(frozen=True, kw_only=True)
class DataParallel(Parallel):
    """Replicas that sum their gradients.

    Args:
        micro_batches: parts in which each rank works through its rows, one after the other.
    """

    micro_batches: int = 1

    def __post_init__(self) -> None:
        check_micro_batches(self.micro_batches)

    def __call__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group) -> Run:
        """Take over the training of a model."""
        return Replicas(model, optimizer, loss, group, self.micro_batches)


class RowsRun(Run):
    """A run whose ranks share a batch's rows; what becomes of the gradients is the subclass's.

    A rank's rows are $1/N$ of the batch, to one row. Each micro-batch's loss is weighted by its share of the rows, so that
    the sum over micro-batches and ranks is the mean over the batch. `trained` lists the parameters, each once.
    """

    def __init__(self, model: nn.Module, loss: Loss, group: Group, micro_batches: int) -> None:
        super().__init__(model, loss, group)
        self.micro_batches = micro_batches
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        if not self.trained:
            raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update on the group's batch."""
        rows, parts = len(inputs), self.group.size * self.micro_batches
        if rows < parts or len(targets) != rows:
            raise ValueError(
                f"inputs of {rows} and targets of {len(targets)} rows must be equally many, and at least "
                f"{parts}: one for each of {self.micro_batches} micro-batches of {self.group.size} ranks"
            )
        mine = slice(self.group.rank * self.micro_batches, (self.group.rank + 1) * self.micro_batches)
        total = torch.zeros((), device=self.group.device, dtype=torch.float64)
        for x, y in zip(inputs.tensor_split(parts)[mine], targets.tensor_split(parts)[mine], strict=True):
            with self.forward_pass():
                part = self.loss(self.model(x), y) * (len(x) / rows)
            part.backward()  # type: ignore[no-untyped-call]
            self.after_backward()
            total += part.detach()
        return self._update(total)

    def _update(self, loss: Tensor) -> float:
        """Tell the others which parameters have a gradient here, along with the loss, and update."""
        said = torch.cat((loss[None], loss.new_tensor([float(self.has_gradient(p)) for p in self.trained])))
        said = self.group.all_reduce(said).cpu()
        self.update({p for p, ranks in zip(self.trained, said[1:].tolist(), strict=True) if ranks})
        return float(said[0])

    def forward_pass(self) -> AbstractContextManager[object]:
        """What surrounds the forward pass of a micro-batch."""
        return nullcontext()

    def after_backward(self) -> None:
        """What follows the backward pass of a micro-batch."""
        return

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether this rank's backward passes reached a parameter."""
        return parameter.grad is not None

    def update(self, reached: set[nn.Parameter]) -> None:
        """Sum gradients and update; a parameter that no rank reached stays as it is, without weight decay."""
        raise NotImplementedError


class Replicas(RowsRun):
    """Everything everywhere."""

    def __init__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group, micro_batches: int) -> None:
        super().__init__(model, loss, group, micro_batches)
        for parameter in model.parameters():
            group.broadcast(parameter.data)
        self.optimizer = optimizer(self.trained)

    def update(self, reached: set[nn.Parameter]) -> None:
        """All-reduce all gradients as one tensor a dtype, and update everything."""
        for dtype in sorted({p.dtype for p in reached}, key=str):
            parameters = [p for p in self.trained if p in reached and p.dtype == dtype]
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat = self.group.all_reduce(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            self.peak = max(self.peak, flat.nbytes)
            for p, summed in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
                assert p.grad is not None
                p.grad.copy_(summed.view_as(p))
        self.optimizer.step()
        gradients = bytes_of(p.grad for p in self.trained if p.grad is not None)
        self.held = Held(bytes_of(self.model.parameters()), gradients, bytes_of(state_tensors(self.optimizer)))
        self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def close(self) -> nn.Module:
        """The model, which is plain all along."""
        return self.model


def check_micro_batches(micro_batches: int) -> None:
    """Check the setting that all methods with rows have.

    Raises:
        ValueError: not one or more.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches} must be at least 1: the rank's rows in one piece")
