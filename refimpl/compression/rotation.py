r"""Turning the residual stream: what writes it and what reads it take another basis, and no output of the model changes.

RMSNorm without its weight divides a vector by its length, which an orthogonal Q leaves as it is:
$\operatorname{RMSNorm}(xQ) = \operatorname{RMSNorm}(x) Q$. So the stream x may become $xQ$ everywhere, if all that is summed into it
is multiplied by Q and all that reads it by $Q^\top$.

A norm's weight stands between, and LayerNorm subtracts the mean, which no Q keeps. `fold_norms_` moves both out of the way first: the
weight and the bias into the layers that read the norm, the mean into the modules that write the stream. A norm's mean of x is zero
when each of its summands has mean zero.

Source: `slicegpt` (arXiv 2401.15024), Theorem 1 of "Computational invariance in transformer networks"
and "LayerNorm transformers can be converted to RMSNorm"; official code
microsoft/TransformerCompression@6b12cdee6ad51791d7c776b3a046bc408b9e77e9, src/slicegpt/layernorm_fusion.py and rotate.py.

Differs from the paper: the official code subtracts the mean from the embeddings of models with RMSNorm too, which changes what they
compute; here it does not. Norms keep their own epsilon; there it becomes 1e-5.

Not here: which Q; rotations inside of a block.

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import initialize_
    >>> config = Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6, tied_embeddings=True)
    >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0)).double()
    >>> tokens = torch.arange(5)[None]
    >>> before = model(tokens)
    >>> parts = fold_norms_(model)
    >>> rotate_stream_(model, parts, torch.linalg.qr(torch.arange(64.0).sin().view(8, 8).double()).Q)
    >>> torch.allclose(model(tokens), before), model.config.tied_embeddings, model.lm_head
    (True, False, Linear(in_features=8, out_features=9, bias=False))
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import Anatomy, anatomy
from refimpl.model.linear import is_linear, is_transposed, sizes
from refimpl.model.model import Decoder, RMSNorm


@torch.no_grad()
def fold_norms_(model: nn.Module) -> Anatomy:
    """Make every norm an RMSNorm whose weight is one, in place, by folding the rest of it into its neighbours; in float64.

    An output layer that is the embedding becomes a layer of its own, and the configuration says so.

    Args:
        model: one that `anatomy` knows.

    Returns:
        Its parts, the output layer among them.

    Raises:
        ValueError: `anatomy` does not know the model; nothing normalizes the stream at its end, or it has no output layer.
    """
    parts = _untie_(model, anatomy(model))
    if parts.norm is None or parts.reader is None:
        raise ValueError(
            "the stream must end in a norm and an output layer: a model without one of them can't be rotated"
        )
    readers = {parts.norm: [parts.reader]}
    for block in parts.blocks:
        readers[block.attention_norm] = list(dict.fromkeys((block.q, block.k, block.v)))
        readers[block.feed_forward_norm] = [name for name in (block.gate, block.up) if name is not None]
    centred = False
    for name, following in readers.items():
        norm: Any = model.get_submodule(name)
        centred |= isinstance(norm, nn.LayerNorm)
        for reader in following:
            _fold_(model.get_submodule(reader), norm)
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        model.set_submodule(name, RMSNorm(norm.weight.numel(), eps).to(norm.weight.device, norm.weight.dtype))
    if centred:
        for name in stream_writers(parts):
            _centre_(model.get_submodule(name))
    return parts


def stream_writers(parts: Anatomy) -> list[str]:
    """Names of all that is summed into the stream: the embeddings, and the output layers of attention and feed-forward."""
    return [*parts.writers, *(name for block in parts.blocks for name in (block.o, block.down))]


def rotate_stream_(model: nn.Module, parts: Anatomy, q: Tensor) -> None:
    """The stream x becomes $xQ$, in place.

    Args:
        model: one that `fold_norms_` has been through.
        parts: what that returned.
        q: `[d_model, d_model]`, orthogonal, float64.
    """
    for name in stream_writers(parts):
        write_in_(model.get_submodule(name), q)
    readers = [name for block in parts.blocks for name in (block.q, block.k, block.v, block.gate, block.up)]
    for reader in dict.fromkeys((*readers, parts.reader)):
        if reader is not None:
            read_in_(model.get_submodule(reader), q)


@torch.no_grad()
def read_in_(layer: nn.Module, q: Tensor) -> None:
    r"""Make a linear layer read $xQ$ where it read x, in place: $W \to WQ$, the product in float64.

    Args:
        layer: `torch.nn.Linear` or `Conv1D`.
        q: `[in, kept]`, orthonormal columns; where fewer than `in` are kept, the layer shrinks.
    """
    assert is_linear(layer)
    _set_(layer, _matrix(layer) @ q.to(layer.weight.device, torch.float64))


@torch.no_grad()
def write_in_(module: nn.Module, q: Tensor) -> None:
    r"""Make a linear layer or an embedding write $yQ$ where it wrote y, in place: $W \to Q^\top W$, the product in float64.

    Args:
        module: `torch.nn.Linear`, `Conv1D` or `torch.nn.Embedding`.
        q: `[out, kept]`, orthonormal columns; where fewer than `out` are kept, the module shrinks.
    """
    q = q.to(next(module.parameters()).device, torch.float64)
    if isinstance(module, nn.Embedding):
        _set_(module, module.weight.double() @ q)
        return
    assert is_linear(module)
    _set_(module, q.T @ _matrix(module), None if module.bias is None else module.bias.double() @ q)


def _untie_(model: nn.Module, parts: Anatomy) -> Anatomy:
    """Give the reader of the stream a weight of its own."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, Decoder) and model.lm_head is None:
        table = model.embedding.weight
        model.lm_head = nn.Linear(config.d_model, config.vocabulary, bias=False, device="meta", dtype=table.dtype)
        model.lm_head.weight = nn.Parameter(table.detach().clone())
        model.lm_head.train(model.training)
        model.config = dataclasses.replace(config, tied_embeddings=False)
        return dataclasses.replace(parts, reader="lm_head")
    reader: Any = None if parts.reader is None else model.get_submodule(parts.reader)
    if reader is not None and any(model.get_submodule(name).weight is reader.weight for name in parts.writers):
        reader.weight = nn.Parameter(reader.weight.detach().clone())
        config.tie_word_embeddings = False
    return parts


def _fold_(layer: nn.Module, norm: Any) -> None:
    """A norm's weight and bias, moved into a layer that reads it: $W(w x + b) + c = (W w) x + (W b + c)$."""
    assert is_linear(layer)
    matrix, bias = _matrix(layer), layer.bias
    shift = getattr(norm, "bias", None)
    if shift is not None:
        added = matrix @ shift.double()
        bias = added if bias is None else bias.double() + added
    _set_(layer, matrix * norm.weight.double(), bias)


def _centre_(module: nn.Module) -> None:
    """Subtract the mean over channels from whatever a module writes."""
    if isinstance(module, nn.Embedding):
        table = module.weight.double()
        _set_(module, table - table.mean(dim=1, keepdim=True))
        return
    assert is_linear(module)
    matrix = _matrix(module)
    bias = None if module.bias is None else module.bias.double()
    _set_(module, matrix - matrix.mean(dim=0), None if bias is None else bias - bias.mean())


def _matrix(layer: nn.Linear) -> Tensor:
    """The weight as `[out, in]`, float64."""
    weight = layer.weight.detach().double()
    return weight.T if is_transposed(layer) else weight


def _set_(module: nn.Module, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear layer `[out, in]` or an embedding `[tokens, channels]` another weight and size; no bias leaves its own."""
    old: Any = module.weight
    stored = matrix.T if is_transposed(module) else matrix
    module.weight = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(old.dtype), requires_grad=old.requires_grad)
    names: Any = module
    if isinstance(module, nn.Embedding):
        names.embedding_dim = matrix.shape[1]
    elif is_linear(module):
        outputs, inputs = sizes(module)
        if is_transposed(module):
            names.nf, names.nx = outputs, inputs
        else:
            names.out_features, names.in_features = outputs, inputs
