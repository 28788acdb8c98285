r"""A block's call again, while its layers are replaced or tried with other weights.

Examples:
    >>> around = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    >>> around[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    >>> output = Output(nn.ModuleDict({"around": around}), ["around.0"], "around.2", (), {})
    >>> output(torch.tensor([[3.0, 4.0]]), output.weight).tolist(), output(torch.tensor([[3.0, 4.0]]), -output.weight).tolist()
    ([[3.0, 0.0]], [[0.0, 4.0]])
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from refimpl.compression.block_inputs import hidden_states, without_cache
from refimpl.model.linear import is_transposed, weight_of


@dataclass(frozen=True)
class Rerun:
    """A block's call, again and again while its layers are being replaced."""

    block: nn.Module
    stream: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Tensor:
        """What the block returns."""
        return hidden_states(self.block(self.stream, *self.args, **self.kwargs))

    def seen_by(self, layer: nn.Module, around: nn.Module) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """A layer's input, and the arguments of the module that it stands in, without those hidden states that come first."""
        calls: list[Any] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = {key: without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
            calls.append((tuple(map(without_cache, args[1:])), kwargs))

        inputs: list[Tensor] = []
        with around.register_forward_pre_hook(note, with_kwargs=True), _stop_at(layer, inputs):
            self()
        args, kwargs = calls[0] if calls else ((), {})
        return inputs[0], args, kwargs


class Output:
    """What some layers make of their common input: their outputs, or what that becomes on its way to another layer.

    Args:
        model: with the layers.
        consumers: names of layers in one module.
        target: name of another layer in it, whose input is returned; None returns the layers' outputs, without biases.
        args: further arguments of the module.
        kwargs: those by name.
    """

    def __init__(
        self, model: nn.Module, consumers: list[str], target: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.around = model.get_submodule(consumers[0].rpartition(".")[0])
        self.layers: list[Any] = [model.get_submodule(name) for name in consumers]
        self.names = [name.rpartition(".")[2] for name in consumers]
        self.target = None if target is None else model.get_submodule(target)
        self.args, self.kwargs = args, kwargs
        weights = [weight_of(layer) for layer in self.layers]
        self.weight = torch.cat([weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights])

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`[..., out]` of inputs `[..., in]` and the layers' weights, one below the other, `[out of all, in]`."""
        if self.target is None:
            return F.linear(x, weight)
        dtype = self.layers[0].weight.dtype
        parts = torch.split(weight.to(dtype), [len(weight_of(layer)) for layer in self.layers])
        replaced = {
            f"{name}.weight": part.T if is_transposed(layer) else part
            for name, layer, part in zip(self.names, self.layers, parts, strict=True)
        }
        seen: list[Tensor] = []
        with _stop_at(self.target, seen):
            functional_call(self.around, replaced, (x.to(dtype), *self.args), self.kwargs)
        return seen[0].to(weight.dtype)


class _Reached(Exception):
    """What was wanted is known; the rest need not run."""


@contextmanager
def _stop_at(layer: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """While entered, a call of a layer ends what is running, and its input is added to a list."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    with suppress(_Reached), layer.register_forward_pre_hook(stop):
        yield
