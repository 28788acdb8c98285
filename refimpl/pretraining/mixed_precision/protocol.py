r"""What the precision policies share: forward and backward on low-precision copies of the weights.

Glossary
    master      the model's own parameters, float32, which the optimizer moves
    copy        a master rounded to the low dtype, which forward and backward see in its place
    scale       $S$, what the loss is multiplied by before the backward pass, and gradients are divided by after it

Examples:
    >>> model = nn.Linear(2, 1, bias=False)
    >>> session = CopiedWeights(model, torch.bfloat16)
    >>> _ = session.backward(model, lambda model, batch: model(batch).sum(), torch.ones(1, 2))
    >>> model.weight.grad.tolist(), model.weight.grad.dtype, session.nbytes
    ([[1.0, 1.0]], torch.float32, 4)

Invariants: see `refimpl/pretraining/protocol.py`; run for every policy by `tests/pretraining/mixed_precision/test_protocol.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from refimpl.model.train import Loss


class CopiedWeights:
    """A training whose forward and backward run on copies of the weights in a low dtype, loss unscaled.

    It works on any module: for the time of the loss its parameters are replaced by their copies, tied ones by one copy.
    Buffers stay as they are. A floating-point batch is cast to the low dtype too.

    Args:
        model: its floating-point parameters must be float32; frozen ones are copied and get no gradient.
        dtype: of the copies.

    Raises:
        ValueError: a parameter is of another floating-point dtype.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.scale = model, dtype, 1.0
        self.masters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        for name, p in self.masters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"parameter {name!r} is {p.dtype}; steps are added in float32: pass model.float()")
        self.copies = {name: torch.empty_like(p, dtype=dtype).detach() for name, p in self.masters.items()}
        self.places = self._places()

    def _places(self) -> dict[str, str]:
        """Every place in the model where a master stands, and the master's name: each place once, a tied master often.

        `functional_call` would find tied places itself, but visits a module that is used twice twice, and then leaves a copy
        in the model.
        """
        names = {id(p): name for name, p in self.masters.items()}
        return {
            f"{prefix}.{name}" if prefix else name: names[id(p)]
            for prefix, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in names
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for copy in self.copies.values())

    def backward(self, model: nn.Module, loss: Loss, batch: Tensor) -> Tensor:
        """Add the gradient of `loss(model, batch)` to the masters' `grad`, and return the unscaled loss, float32.

        Raises:
            ValueError: the training was started with another model.
        """
        if model is not self.model:
            raise ValueError("this training was started with another model: call `start` for this one")
        names = [name for name, p in self.masters.items() if p.requires_grad]
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), list(self.masters.values()))
        seen = {name: copy.requires_grad_(self.masters[name].requires_grad) for name, copy in self.copies.items()}
        value: Tensor = functional_call(
            _LossOf(model, loss),
            {f"model.{place}": seen[name] for place, name in self.places.items()},
            (batch.to(self.dtype) if batch.is_floating_point() else batch,),
            tie_weights=False,
        ).float()
        narrow = torch.autograd.grad(value * self.scale, [seen[name] for name in names], allow_unused=True)
        reached = [(self.masters[name], g) for name, g in zip(names, narrow, strict=True) if g is not None]
        self.add_gradients([p for p, _ in reached], [g for _, g in reached])
        return value.detach()

    @torch.no_grad()
    def add_gradients(self, masters: list[nn.Parameter], narrow: list[Tensor]) -> list[Tensor]:
        """Divide gradients by the scale in float32 and add them to what the masters have; returns them, divided."""
        wide = [torch.empty_like(p) for p in masters]
        torch._foreach_copy_(wide, narrow)
        if self.scale != 1.0:
            torch._foreach_mul_(wide, 1 / self.scale)
        for p, g in zip(masters, wide, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        return wide

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer's step on the masters."""
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the copies are made anew in each `backward`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class _LossOf(nn.Module):
    """A loss as a module that holds the model, so that all of the loss sees the replaced parameters."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Tensor) -> Tensor:
        return self.loss(self.model, batch)
