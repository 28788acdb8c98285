r"""What all methods share that adapt a trained model to a task.

Glossary
    model       any `torch.nn.Module`; changed in place, since a second copy of a large model may not fit
    layer       a linear layer of it, `torch.nn.Linear` or transformers' `Conv1D`: `[..., in]` to `[..., out]`
    weight      $W$, `[out, in]` in a Linear, `[in, out]` in a Conv1D
    target      patterns of layers' whole names, as in a shell: `*q_proj`, `*.layers.1.*`
    trainable   the parameters that training updates, by name

A method is a configuration; its calls stand around a training loop of your own:

Examples:
    >>> from refimpl.finetuning.peft.lora.lora import LoRA
    >>> model, method = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), LoRA(rank=2, target=("*",))
    >>> optimizer = torch.optim.AdamW(method.trainable(method.inject(model)).values())
    >>> model(torch.ones(4, 5)).sum().backward()
    >>> optimizer.step()
    >>> method.merge(model)
    Sequential(
      (0): Linear(in_features=5, out_features=7, bias=True)
      (1): Tanh()
      (2): Linear(in_features=7, out_features=3, bias=True)
    )

Invariants, run for every method by `tests/finetuning/test_protocol.py`: training moves what `trainable` names and
nothing else; with that, the base model and the configuration rebuild the adapted model; `merge` changes no output, and
leaves the modules of before wherever the facet `changes_architecture` is false; tensors of the base are never written;
a batch equals its rows one by one; the same generator gives the same result; a configuration holds nothing of a model.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from refimpl.model.linear import is_linear

M = TypeVar("M", bound=nn.Module)


class FineTuning(Protocol):
    """A method: a frozen dataclass of settings with these three calls."""

    def inject(self, model: M, generator: torch.Generator | None = None) -> M:
        """Prepare the model for training, in place, and return it; what is drawn comes from `generator`."""
        ...

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that training updates, by name; all others are frozen."""
        ...

    def merge(self, model: M) -> M:
        """Bring the trained model into the form that is served, in place, and return it."""
        ...


class AdaptedLinear(nn.Module):
    """A frozen layer with a trained change of its weight: a subclass gives `weight`, and a `forward` that is fast.

    Code that reads a layer's weight and never calls the layer, as `nn.MultiheadAttention` does, gets the changed one.

    Args:
        base: the layer; kept as it is, so that `merge` can put it back.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.training = base.training  # a new module is in training mode, whatever mode the model is in

    @property
    def weight(self) -> Tensor:
        """The changed weight, in the dtype and the layout of the base's; differentiable."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias


def adapt(model: M, target: Sequence[str], wrap: Callable[[str, nn.Linear], AdaptedLinear]) -> M:
    """Freeze a model and put `wrap(name, layer)` in the place of each layer that matches.

    A layer that stands under several names stays one layer. Nothing is changed if anything is wrong.

    Raises:
        ValueError: no layer matches, one is adapted already, or one has no floating-point weight.
    """
    wrapped: dict[nn.Module, nn.Module] = {layer: wrap(name, layer) for name, layer in _matching(model, target).items()}
    model.requires_grad_(False)  # what was wrapped around is not part of the model yet, and trains
    return _replace(model, wrapped)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that take a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merge(model: M) -> M:
    """Give each adapted layer its changed weight and put the plain layer back, frozen.

    The changed weight is a new tensor: what was tied to another layer's is so no longer, and that layer is as before.

    Raises:
        ValueError: no layer is adapted.
    """
    plain: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.base.weight = nn.Parameter(layer.weight, requires_grad=False)
            plain[layer] = layer.base
    if not plain:
        raise ValueError("the model has no adapted layer: inject first, and merge once")
    return _replace(model, plain)


def _matching(model: nn.Module, target: Sequence[str]) -> dict[str, nn.Linear]:
    """Layers below the model whose names match; one that stands under several names under each that matches."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = {layer.base for layer in modules.values() if isinstance(layer, AdaptedLinear)}
    layers = {
        name: layer
        for name, layer in modules.items()
        if name and layer not in inside and (is_linear(layer) or isinstance(layer, AdaptedLinear))
    }
    found = {name: layer for name, layer in layers.items() if any(fnmatchcase(name, pattern) for pattern in target)}
    if not found:
        near = [name for pattern in target for name in get_close_matches(pattern, layers, n=4, cutoff=0.0)]
        raise ValueError(
            f"target={tuple(target)} matches no linear layer below the model; near: {near or 'it has none'}"
        )
    for name, layer in found.items():
        if isinstance(layer, AdaptedLinear):
            raise ValueError(f"layer {name!r} is adapted already: merge the model before injecting again")
        if not layer.weight.is_floating_point():
            raise ValueError(f"layer {name!r} holds {layer.weight.dtype}; only floating-point weights can be adapted")
    return {name: layer for name, layer in found.items() if is_linear(layer)}


def _replace(model: M, new: dict[nn.Module, nn.Module]) -> M:
    """Put modules in the places of others, in place."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    return model
