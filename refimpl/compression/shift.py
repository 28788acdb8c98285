r"""Moving the centre of a norm's channels: what is subtracted there is made up by the biases of the layers that read them.

Examples:
    >>> from refimpl.compression.anatomy import Feed, widened
    >>> model = nn.ModuleDict({"norm": nn.LayerNorm(2), "layer": nn.Linear(2, 1, bias=False)})
    >>> feed, x = Feed("norm", ("layer",), torch.arange(2)), torch.tensor([[1.0, 3.0]])
    >>> before = model["layer"](model["norm"](x))
    >>> shift_(model, feed, torch.tensor([5.0, -2.0])).tolist()
    [5.0, -2.0]
    >>> model["norm"](x).round().tolist(), torch.allclose(model["layer"](model["norm"](x)), before, atol=1e-6)
    ([[-6.0, 3.0]], True)
"""

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import Feed, widened
from refimpl.compression.protocol import CompressedLinear
from refimpl.model.linear import is_linear, weight_of


def is_shiftable(model: nn.Module, feed: Feed) -> bool:
    """Whether a feed comes from a norm with a bias, which takes the shift."""
    producer = model.get_submodule(feed.producer)
    is_norm = not is_linear(producer) and not isinstance(producer, CompressedLinear)
    return is_norm and getattr(producer, "bias", None) is not None


@torch.no_grad()
def shift_(model: nn.Module, feed: Feed, shift: Tensor) -> Tensor:
    r"""Subtract z from a norm's output and add $z W^\top$ to the biases of what reads it, in place; no output of the model changes.

    A reader without a bias gets one.

    Args:
        model: that of the feed.
        feed: one that `is_shiftable`.
        shift: z, `[in]`.

    Returns:
        z as the norm's bias could take it, in its dtype's precision; `[in]`, float32 at least.

    Raises:
        ValueError: the norm has no bias.
    """
    if not is_shiftable(model, feed):
        raise ValueError(f"{feed.producer} has no bias that could take a shift: leave it, and scale only")
    norm: Any = model.get_submodule(feed.producer)
    before = widened(norm.bias.clone())
    norm.bias.copy_(before - shift)
    shift = before - widened(norm.bias)
    for name in feed.consumers:
        layer: Any = model.get_submodule(name)
        moved = (widened(weight_of(layer)) @ shift).to(layer.weight.dtype)
        if layer.bias is None:
            layer.bias = nn.Parameter(moved, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.add_(moved)
    return shift
