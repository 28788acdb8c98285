r"""What all optimizers share.

Glossary
    parameter   $\theta$, a tensor that takes a gradient; left alone where it has none
    gradient    $g$, in the parameter's shape and dtype
    settings    of a group: lr $\eta$, betas $\beta$, weight_decay $\lambda$, …; those of the constructor where it gives none
    state       what is kept of a parameter from step to step, by name
    decay       decoupled: each step multiplies a parameter by $1 - \eta\lambda$, the learning rate included, as in PyTorch

Parameters in half precision are moved in float32 and rounded once, and their states are float32: in their own dtype small
squares would be zero, and an average that moves by a thousandth of itself would stand still. (PyTorch's optimizers keep
states in the parameter's dtype.)

An optimizer says what state a parameter starts with and how a list of parameters moves; the rest is here:

Examples:
    >>> class SignSGD(Optimizer):
    ...     def check(self, settings):
    ...         check_range("lr", settings["lr"], low=0.0)
    ...     def fresh_state(self, parameter, settings):
    ...         return {}
    ...     def update(self, parameters, gradients, states, settings):
    ...         torch._foreach_add_(parameters, torch._foreach_sign(gradients), alpha=-settings["lr"])
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = SignSGD([weight], {"lr": 0.25})
    >>> (weight**2).sum().backward()
    >>> optimizer.step(), weight.tolist()
    (None, [0.75, -0.75])

Invariants, run for every optimizer by `tests/pretraining/optimizers/test_protocol.py`: only `step` moves anything, and only
parameters with a gradient; without gradient signal and decay nothing moves; groups keep their own settings; saved, loaded
and continued equals uninterrupted, bit for bit, and the copy shares no memory; a closure is evaluated once, with gradients
enabled; sparse gradients and complex parameters are refused; a step in half precision is the step in float32, rounded; the
minimum of a quadratic is found.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from refimpl.model.train import Loss
from refimpl.pretraining.protocol import Part

# Elements that one call of `update` works on. Temporaries stay this small, and on a CPU stay in its cache; on a GPU the
# kernels must be large enough to hide their start.
CHUNK = {"cpu": 1 << 16, "other": 1 << 25}


class Optimizer(torch.optim.Optimizer, ABC):
    """An optimizer: a subclass gives `check`, `fresh_state` and `update`.

    Args:
        params: parameters, named parameters, or groups of them with settings of their own.
        defaults: settings of groups that give none.

    Raises:
        ValueError: settings out of range, or complex parameters.
    """

    part: ClassVar[Part] = "optimizer"

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @abstractmethod
    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for a group's settings that are out of range."""

    @abstractmethod
    def fresh_state(self, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """State of a parameter, float32 or float64, before its first step."""

    @abstractmethod
    def update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """Move parameters, and their states, in place; gradients are only read.

        All are on one device and of one dtype, float32 or float64.
        """

    def probe(self, backward: Callable[[Loss], Tensor]) -> None:
        """Look at the model before a step; most optimizers have no need.

        Args:
            backward: adds the gradient of any `loss(model, batch)`, on the batch of this step, to the parameters' `grad`.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: evaluates the loss anew and sets the gradients, before anything moves.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse. Nothing has then moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(p.grad.layout != torch.strided for parameters in held for p in parameters):
            raise ValueError(f"{type(self).__name__} takes no sparse gradients: use nn.Embedding(…, sparse=False)")
        for group, parameters in zip(self.param_groups, held, strict=True):
            for chunk in _chunks(parameters):
                self._move(chunk, group)
        return loss

    def _move(self, parameters: list[Tensor], settings: Mapping[str, Any]) -> None:
        """`update`, on float32 copies if the parameters are narrower."""
        gradients = [cast(Tensor, p.grad) for p in parameters]
        wide = parameters
        if torch.finfo(parameters[0].dtype).bits < 32:
            wide, gradients = [p.float() for p in parameters], [g.float() for g in gradients]
        for p, w in zip(parameters, wide, strict=True):
            if not self.state[p]:
                self.state[p] = self.fresh_state(w, settings)
        self.update(wide, gradients, [self.state[p] for p in parameters], settings)
        if wide is not parameters:
            torch._foreach_copy_(parameters, wide)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; what the group does not set is as in the constructor."""
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__} takes real floating-point parameters, not {p.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same parameters stood when its `state_dict` was taken.

        States are copied and keep the dtype they were saved in; PyTorch's own method shares memory with what was given, and
        casts to the dtype of the parameter.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = _copied(value, p.device)


def _copied(value: Any, device: torch.device) -> Any:
    """A state's value with tensors of its own, on a device."""
    if isinstance(value, Tensor):  # a single number, as a step count, may stand elsewhere
        return value.to(device=device if value.ndim else value.device, copy=True)
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, device) for item in value)
    return {name: _copied(item, device) for name, item in value.items()} if isinstance(value, dict) else value


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in their order, in lists of one device and dtype with about `CHUNK` elements; a large one stands alone."""
    chunk: list[Tensor] = []
    size = 0
    for p in parameters:
        limit = CHUNK.get(p.device.type, CHUNK["other"])
        if chunk and (size + p.numel() > limit or (p.device, p.dtype) != (chunk[0].device, chunk[0].dtype)):
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += p.numel()
    if chunk:
        yield chunk


def check_range(name: str, value: float, low: float, high: float = math.inf, hint: str = "") -> None:
    """Check that low <= value < high.

    Raises:
        ValueError: it is not, or is no number.

    Examples:
        >>> check_range("betas[0]", 1.0, 0.0, 1.0, "0.9 is usual")
        Traceback (most recent call last):
        ValueError: betas[0]=1.0 must be in [0.0, 1.0); 0.9 is usual
    """
    if not low <= value < high:
        allowed = f"in [{low}, {high})" if high < math.inf else f"finite and at least {low}"
        raise ValueError(f"{name}={value} must be {allowed}" + (f"; {hint}" if hint else ""))
