r"""Cutting channels out of modules: what is left are ordinary, smaller modules, and no zeros.

A head goes with its rows in the layers that make queries, keys and values, and with its columns in the layer that reads what it
attends to; a neuron with its row in the layer before it and its column in the one behind it; a channel of the residual stream with a
column of the embedding, an entry of each norm, a row or a column of each layer that writes or reads the stream.

Not here: which channels go; blocks (`refimpl.compression.blocks`).

Examples:
    >>> layer = nn.Linear(3, 4)
    >>> keep_outputs_(layer, torch.tensor([0, 2]))
    >>> keep_inputs_(layer, torch.tensor([1]))
    >>> layer, layer.weight.shape, layer.bias.shape
    (Linear(in_features=1, out_features=2, bias=True), torch.Size([2, 1]), torch.Size([2]))
"""

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.model.linear import is_linear, is_transposed, sizes, weight_of

OUTPUT_LAYERS = ("o_proj", "out_proj", "c_proj")  # an attention's, in the layouts of `refimpl.compression.anatomy`


def keep_outputs_(module: nn.Module, kept: Tensor, scale: Tensor | None = None) -> None:
    """Keep some of the channels that a linear layer, an embedding or a norm makes, in place; its parameters become smaller.

    Args:
        module: `torch.nn.Linear`, transformers' `Conv1D`, an embedding, or a norm with a weight and perhaps a bias.
        kept: channels, in the order that they shall have.
        scale: `[kept]`, what each of them is multiplied by; the product is taken in float32 or more. None leaves them.
    """
    names: Any = module
    if is_linear(module):
        _set_(module, "weight", _scaled(weight_of(module)[kept], scale, rows=True))
        _named_sizes_(module)
    elif isinstance(module, nn.Embedding):
        _set_(module, "weight", _scaled(module.weight.detach()[:, kept], scale))
        names.embedding_dim = len(kept)
    else:
        _set_(module, "weight", _scaled(names.weight.detach()[kept], scale))
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(kept),)
    if getattr(module, "bias", None) is not None:
        _set_(module, "bias", _scaled(names.bias.detach()[kept], scale))


def keep_inputs_(layer: nn.Module, kept: Tensor, scale: Tensor | None = None) -> None:
    """Keep some of the channels that a linear layer reads, in place; its weight becomes smaller.

    Args:
        layer: `torch.nn.Linear` or transformers' `Conv1D`.
        kept: channels, in the order in which they come.
        scale: `[kept]`, what each of them is multiplied by; None leaves them.
    """
    assert is_linear(layer)
    _set_(layer, "weight", _scaled(weight_of(layer)[:, kept], scale))
    _named_sizes_(layer)


def recount_heads_(model: nn.Module) -> None:
    """Tell attention modules that keep a number of heads (OPT's, GPT-2's) how many are left, in place."""
    for module in model.modules():
        names: Any = module
        found = (getattr(module, name, None) for name in OUTPUT_LAYERS)
        output = next((layer for layer in found if is_linear(layer)), None)
        if output is None or not isinstance(getattr(module, "head_dim", None), int):
            continue
        width = sizes(output)[1]
        for name, value in {"num_heads": width // names.head_dim, "split_size": width}.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, value)


def _scaled(kept: Tensor, scale: Tensor | None, *, rows: bool = False) -> Tensor:
    if scale is None:
        return kept
    wide = torch.promote_types(kept.dtype, torch.float32)
    scale = scale.detach().to(kept.device, wide)
    return (kept.to(wide) * (scale[:, None] if rows else scale)).to(kept.dtype)


def _set_(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module another parameter; a weight is `[out, in]`."""
    old: Any = getattr(module, name)
    stored = value.T if name == "weight" and is_transposed(module) else value
    setattr(module, name, nn.Parameter(stored.clone(memory_format=torch.contiguous_format), old.requires_grad))


def _named_sizes_(layer: nn.Linear) -> None:
    """Write into a linear layer how large it is."""
    names: Any = layer
    if is_transposed(layer):
        names.nf, names.nx = sizes(layer)
    else:
        names.out_features, names.in_features = sizes(layer)
