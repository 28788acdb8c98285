r"""What all methods share that compress a model: layer by layer, or as a whole.

Glossary
    weight      $W$, `[out, in]`, as in `torch.nn.Linear`
    inputs      $X$, `[n, in]`, what the layer saw on calibration data, one row a token
    dense       $\hat W$, `[out, in]`, what the compressed weight multiplies by
    read        what a compressed weight makes of the layer's inputs before the product: their quantized values, or themselves
    nbytes      bytes held: codes, scales, zeros, indices, factors; everything
    calibration a list of batches, each a tensor or a dict of keyword arguments that the model is called with

A *layer method* is a configuration that is called on a layer, `Method(**config)(weight, inputs) -> CompressedWeight`; one
that needs no data ignores `inputs` and says so by `needs_inputs = False`. `compress` drives it over a model. A *model
method* is called on the whole model, `Method(**config)(model, calibration) -> model`. `apply` runs either.

Invariants, run for every method by `tests/compression/test_protocol.py`. Of a layer: weight and inputs are not written; the
same call gives the same result; `dense()` has the weight's shape and dtype; `multiply` is the product of `read` with it; `nbytes` is
what its buffers hold; saving and loading the buffers is the identity; nothing of the last layer is left in the next. Of a
model: the one given is not written; the same call gives the same result; fewer parameters are held; a batch equals its rows
one by one; decoding with a cache equals reading at once; saving and loading is the identity; the largest setting leaves a
model that runs. Of both: what a decoder becomes goes into a folder and comes back (`folder`), for which a module that stays in the
model holds numbers, texts, floating dtypes and tuples of them, beside tensors and modules.

Examples:
    >>> from refimpl.compression.quantization.weight_only.rtn import RTN
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = compress(model, RTN(bits=4, group_size=32))
    >>> sum(held.nbytes for held in model.parameters()), sum(held.nbytes for held in small.buffers())
    (10528, 1768)
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of, inputs_by_group
from refimpl.model.linear import is_linear, weight_of

M = TypeVar("M", bound=nn.Module)


class CompressedWeight(nn.Module):
    """A weight in its compressed form: buffers hold it, `dense` rebuilds it."""

    def dense(self) -> Tensor:
        r"""$\hat W$, `[out, in]`, in the dtype of the weight that was compressed."""
        raise NotImplementedError

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]` as the product sees them; a form that quantizes them overrides it."""
        return inputs

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        r"""$\operatorname{read}(X)\, \hat W^\top + b$, `[..., in]` to `[..., out]`; what multiplies without `dense` overrides it."""
        return F.linear(self.read(inputs), self.dense(), bias)

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed form holds."""
        return sum(buffer.nbytes for buffer in self.buffers())


class LayerMethod(Protocol):
    """A method that compresses one layer at a time."""

    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> CompressedWeight:
        """Compress `weight` `[out, in]`, with the layer's calibration inputs `[n, in]` where the method needs them."""
        ...


class ModelMethod(Protocol):
    """A method that compresses a model as a whole."""

    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A compressed copy in evaluation mode; `model` is left unchanged."""
        ...


class CompressedLinear(nn.Module):
    """A linear layer that multiplies by a compressed weight.

    Args:
        compressed: the weight.
        bias: `[out]`, copied.
    """

    def __init__(self, compressed: CompressedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.compressed = compressed
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The dense weight, `[out, in]`, for code that reads a layer's weight instead of calling the layer."""
        return self.compressed.dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.compressed.multiply(inputs, self.bias)


def check_layer(weight: Tensor, inputs: Tensor | None = None) -> None:
    """Refuse what no method can compress.

    Raises:
        ValueError: the weight is no matrix, is empty, or holds NaN or infinity; so do the inputs, or their width is not the
            weight's.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix [out, in] with at least one element")
    if not _finite(weight):
        raise ValueError("weight holds NaN or infinity: it can't be compressed")
    if inputs is None:
        return
    if inputs.ndim != 2 or inputs.shape[1] != weight.shape[1] or len(inputs) == 0:
        raise ValueError(
            f"inputs of shape {tuple(inputs.shape)} must be [n, in] with n >= 1 and in = {weight.shape[1]}, the weight's "
            "columns"
        )
    if not _finite(inputs):
        raise ValueError("inputs hold NaN or infinity: look for the calibration text that causes it")


def _finite(x: Tensor) -> bool:
    """Whether all elements are: the extremes carry every NaN and infinity, and cost a tenth of a mask of all elements."""
    return all(torch.isfinite(extreme) for extreme in torch.aminmax(x))


def takes_layers(method: LayerMethod | ModelMethod) -> TypeGuard[LayerMethod]:
    """Whether a method is called on a layer's weight; otherwise it takes a whole model."""
    return next(iter(inspect.signature(method).parameters)) == "weight"


def apply(method: LayerMethod | ModelMethod, model: M, calibration: Iterable[Any] = ()) -> M:
    """A model compressed by a method of either kind: through `compress` at its defaults, or as a whole."""
    return compress(model, method, calibration) if takes_layers(method) else method(model, calibration)  # type: ignore[return-value,arg-type]


def compress(
    model: M,
    method: LayerMethod,
    calibration: Iterable[Any] = (),
    *,
    target: Sequence[str] = ("*",),
    skip: Sequence[str] = ("lm_head",),
    done: Callable[[str], None] = lambda _: None,
) -> M:
    """A copy of a model whose linear layers are compressed, in the order in which the data reaches them.

    Each layer's inputs are what the *already compressed* layers before it make of the calibration data, so that errors do
    not add up unseen; every position counts, padding too. A tied weight (the output embedding, as a rule) is left alone.

    Args:
        model: any module; left unchanged.
        method: applied to each `torch.nn.Linear`, and to transformers' `Conv1D`.
        calibration: batches, each a tensor or a dict of keyword arguments that the model is called with; it is not
            called for a method that says `needs_inputs = False`.
        target: patterns of the whole names of layers to compress, as in a shell.
        skip: patterns of those to leave.
        done: called with each layer's name when it is finished.

    Returns:
        The compressed copy, in evaluation mode.

    Raises:
        ValueError: a pattern stands alone instead of in a list; no linear layer's name matches; a layer that does is compressed
            already or holds integers; the calibration data is no list of batches, never reaches a layer, or makes NaN there.
    """
    batches = batches_of(calibration)
    return compress_(copy.deepcopy(model), method, batches, target=target, skip=skip, done=done)


def compress_(
    model: M,
    method: LayerMethod,
    calibration: Iterable[Any] = (),
    *,
    target: Sequence[str] = ("*",),
    skip: Sequence[str] = ("lm_head",),
    done: Callable[[str], None] = lambda _: None,
) -> M:
    """`compress` in place: the model itself loses its dense weights one by one, and holds no copy of them."""
    batches = batches_of(calibration)
    model.eval()
    layers = matching(model, target, skip)
    wanted = batches and getattr(method, "needs_inputs", True)
    groups = inputs_by_group(model, layers, batches) if wanted else (([name], None) for name in list(layers))
    for names, inputs in groups:
        for name in names:
            layer = layers.pop(name)
            with torch.no_grad():
                packed = CompressedLinear(method(weight_of(layer), inputs), layer.bias)
            model.set_submodule(name, packed)
            done(name)
    return model


def decompress(model: M) -> M:
    r"""A copy whose compressed layers are linear layers again, by the weight $\hat W$: as large as before, and what other tools read.

    Args:
        model: as `compress` or `apply` leaves it; not written.

    Returns:
        The copy. Its layers are `torch.nn.Linear`, where transformers' `Conv1D` stood too; all other modules are as they were.

    Raises:
        ValueError: no layer is compressed, or one quantizes its inputs or outputs, which no plain layer does.

    Examples:
        >>> from refimpl.compression.quantization.weight_only.rtn import RTN
        >>> decompress(compress(nn.Sequential(nn.Linear(32, 8)), RTN(bits=4)))
        Sequential(
          (0): Linear(in_features=32, out_features=8, bias=True)
        )
    """
    plain = copy.deepcopy(model)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, CompressedLinear)}
    if not layers:
        raise ValueError("no layer of the model is compressed: there is nothing to decompress")
    for name, layer in layers.items():
        if type(layer.compressed).read is not CompressedWeight.read or type(layer) is not CompressedLinear:
            raise ValueError(
                f"layer {name!r} quantizes its inputs or outputs, which no plain layer does; use the model as it is"
            )
        weight = layer.weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias, requires_grad=False)
        plain.set_submodule(name, linear)
    return plain


def matching(
    model: nn.Module, target: Sequence[str] = ("*",), skip: Sequence[str] = ("lm_head",)
) -> dict[str, nn.Linear]:
    """The linear layers that `compress` would take, by name, in the order in which they stand; tied ones are left out.

    Raises:
        ValueError: a pattern stands alone instead of in a list; there is none, or one is compressed already or holds integers.
    """
    for name, patterns in {"target": target, "skip": skip}.items():
        if isinstance(patterns, str):
            raise ValueError(f"{name}={patterns!r} must be a list of patterns: [{patterns!r}]")
    layers = {name: layer for name, layer in model.named_modules() if name and is_linear(layer)}
    compressed = {name for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}
    found = {
        name
        for name in layers.keys() | compressed
        if any(fnmatchcase(name, pattern) for pattern in target)
        and not any(fnmatchcase(name, pattern) for pattern in skip)
    }
    if found & compressed:
        raise ValueError(
            f"layer {min(found & compressed)!r} is compressed already; start from the original model, or leave it out by `skip`"
        )
    shared = _shared_weights(model)
    matching = {name: layer for name, layer in layers.items() if name in found and layer.weight not in shared}
    if not matching:
        raise ValueError(
            f"target={list(target)} with skip={list(skip)} matches no linear layer; the model's: {list(layers)[:8] or 'none'}"
        )
    for name, layer in matching.items():
        if not layer.weight.is_floating_point():
            raise ValueError(
                f"layer {name!r} holds {layer.weight.dtype}; only floating-point weights can be compressed"
            )
    return matching


def _shared_weights(model: nn.Module) -> set[Tensor]:
    """Parameters that stand under more than one name."""
    seen: set[Tensor] = set()
    shared: set[Tensor] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if parameter in seen else seen).add(parameter)
    return shared
