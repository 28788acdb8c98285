r"""What all methods share that compress one weight matrix.

Glossary
    weight      $W$, `[out, in]`, as in `torch.nn.Linear`
    inputs      $X$, `[n, in]`, what the layer saw on calibration data, one row a token
    dense       $\hat W$, `[out, in]`, what the compressed weight multiplies by
    nbytes      bytes held: codes, scales, zeros, indices, factors; everything

A method is a configuration that is called on a layer, `Method(**config)(weight, inputs) -> CompressedWeight`; one that needs
no data ignores `inputs`. `compress` drives it over a model.

Invariants, run for every method by `tests/compression/test_protocol.py`: weight and inputs are not written; the same call
gives the same result; `dense()` has the weight's shape and dtype; `nbytes` is what its buffers hold; saving and loading the
buffers is the identity; nothing of the last layer is left in the next.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class CompressedWeight(nn.Module):
    """A weight in its compressed form: buffers hold it, `dense` rebuilds it."""

    def dense(self) -> Tensor:
        r"""$\hat W$, `[out, in]`, in the dtype of the weight that was compressed."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed form holds."""
        return sum(buffer.nbytes for buffer in self.buffers())


class LayerMethod(Protocol):
    """A method that compresses one layer at a time."""

    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Compress `weight` `[out, in]`, with the layer's calibration inputs `[n, in]` where the method needs them."""
        ...


class CompressedLinear(nn.Module):
    """A linear layer that multiplies by a compressed weight."""

    def __init__(self, weight: CompressedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return nn.functional.linear(inputs, self.weight.dense(), self.bias)


def compress(
    model: M,
    method: LayerMethod,
    calibration: Iterable[Any] = (),
    *,
    target: Sequence[str] = ("*",),
    skip: Sequence[str] = ("lm_head",),
    done: Callable[[str], None] = lambda _: None,
) -> M:
    """A copy of a model whose linear layers are compressed, in the order in which they stand.

    Each layer's inputs are what the *already compressed* layers before it make of the calibration data, so that errors do
    not add up unseen. A tied weight (the output embedding, as a rule) is left alone.

    Args:
        model: any module; left unchanged.
        method: applied to each `torch.nn.Linear`.
        calibration: batches, each a tensor or a dict of keyword arguments that the model is called with.
        target: patterns of the whole names of layers to compress, as in a shell.
        skip: patterns of those to leave.
        done: called with each layer's name when it is finished.

    Returns:
        The compressed copy, in evaluation mode.

    Raises:
        ValueError: a pattern stands alone instead of in a list, no linear layer's name matches, or the calibration data never reaches one.
    """
    for name, patterns in {"target": target, "skip": skip}.items():
        if isinstance(patterns, str):
            raise ValueError(f"{name}={patterns!r} must be a list of patterns: [{patterns!r}]")
    model = copy.deepcopy(model).eval()
    batches = list(calibration)
    shared = _shared_weights(model)
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and any(fnmatch(name, pattern) for pattern in target)
        and not any(fnmatch(name, pattern) for pattern in skip)
        and layer.weight not in shared
    ]
    if not names:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        raise ValueError(
            f"target={list(target)} with skip={list(skip)} matches no linear layer; the model's: {linear[:8] or 'none'}"
        )
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        inputs = _inputs_of(model, layer, batches) if batches else None
        with torch.no_grad():
            packed = CompressedLinear(method(layer.weight.detach(), inputs), layer.bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        done(name)
    return model


def _shared_weights(model: nn.Module) -> set[Tensor]:
    """Parameters that stand under more than one name."""
    seen: set[Tensor] = set()
    shared: set[Tensor] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if parameter in seen else seen).add(parameter)
    return shared


@torch.no_grad()
def _inputs_of(model: nn.Module, layer: nn.Module, batches: list[Any]) -> Tensor:
    """What reaches `layer` when the model runs on the batches, `[n, in]`."""
    rows: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2)))
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        handle.remove()
    if not rows:
        raise ValueError("the calibration data never reaches one of the layers to compress; leave it out by `skip`")
    return torch.cat(rows)
