r"""Modules as descriptions and tensors: what a module is in plain words that JSON holds, and the module made again from them.

A description says of a module its class, the plain values that it holds (numbers, texts, dtypes, tuples of them), the parameters and
buffers that it has, and the same of the modules in it. The tensors stand elsewhere, under the names of `state_dict`.

What can't be said so is refused when it is described, so that nothing gets lost in silence: other values, hooks, buffers that are not
saved, classes of others. Making a module runs nothing that a description names: classes are looked up among those of modules in
`refimpl.compression` and the few that a decoder is made of, and filled without a call of their `__init__`.

Not here: files, which are `folder`'s; modules of transformers.

Examples:
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> about = described(layer, "up", {})
    >>> about["class"], about["attributes"], about["parameters"]
    ('torch.nn.modules.linear:Linear', {'in_features': 2, 'out_features': 1}, {'weight': True, 'bias': None})
    >>> again = rebuilt(about, {"up.weight": layer.weight.detach()}, "up", {})
    >>> again, torch.equal(again(torch.ones(2)), layer(torch.ones(2)))
    (Linear(in_features=2, out_features=1, bias=False), True)
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.model.model import Attention, Block, RMSNorm, SwiGLU

FAMILY = "refimpl.compression."
OTHERS = (nn.Linear, nn.Embedding, nn.Identity, Block, Attention, SwiGLU, RMSNorm)
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
BARE = vars(nn.Module())
SAID = {"training", "_parameters", "_buffers", "_modules"}  # of these, what is described, or needs not be


def described(module: nn.Module, where: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is, beside the numbers in its tensors.

    Args:
        module: of a class of `refimpl.compression`, or one that `refimpl.model`'s decoder is made of; so are those in it.
        where: its name, for errors.
        shared: what modules may hold beside plain values, by names of the caller's.

    Raises:
        ValueError: its class, or something that it or a module in it holds, can't be described; the message says which.
    """
    kind = type(module)
    if _looked_up(_name(kind)) is not kind:
        raise ValueError(
            f"{where!r} is a {kind.__module__}.{kind.__qualname__}: only classes of refimpl.compression, and those that "
            "refimpl.model's decoder is made of, can be read back"
        )
    check_bare(module, where)
    return {
        "class": _name(kind),
        "attributes": {
            name: _written(value, f"{where}.{name}", shared) for name, value in vars(module).items() if name not in BARE
        },
        "parameters": {
            name: None if tensor is None else tensor.requires_grad for name, tensor in module._parameters.items()
        },
        "buffers": {name: tensor is not None for name, tensor in module._buffers.items()},
        "modules": {
            name: None if child is None else described(child, f"{where}.{name}", shared)
            for name, child in module._modules.items()
        },
    }


def check_bare(module: nn.Module, where: str) -> None:
    """Refuse hooks, and buffers that are not saved.

    Raises:
        ValueError: the module itself has some.
    """
    for name in BARE.keys() - SAID:
        if vars(module)[name] != BARE[name]:
            raise ValueError(f"{where} has {name.strip('_')}, which can't be written down: remove them before saving")


def rebuilt(about: Mapping[str, Any], state: dict[str, Tensor], where: str, shared: Mapping[str, Any]) -> nn.Module:
    """The module that `described` has described.

    Args:
        about: the description.
        state: tensors by their whole names; the module holds them themselves, and those that it takes are taken out.
        where: its name, with which the names of its tensors begin.
        shared: as it was for `described`.

    Raises:
        ValueError: the description is none, names a class or a shared value that is not known, or a tensor that is not there.
    """
    try:
        return _rebuilt(about, state, where, shared)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where!r} is not described as a module is: {type(error).__name__} {error}") from error


def _rebuilt(about: Mapping[str, Any], state: dict[str, Tensor], where: str, shared: Mapping[str, Any]) -> nn.Module:
    kind = _looked_up(str(about["class"]))
    if kind is None:
        raise ValueError(f"{where!r} is {about['class']!r}, which is no module of refimpl.compression or of a decoder")
    module: nn.Module = kind.__new__(kind)
    vars(module).update({name: _read(value, shared) for name, value in about["attributes"].items()})
    nn.Module.__init__(module)

    def tensor(name: str) -> Tensor:
        if f"{where}.{name}" not in state:
            raise ValueError(f"tensor '{where}.{name}' is described, and missing")
        return state.pop(f"{where}.{name}")

    for name, learns in about["parameters"].items():
        module.register_parameter(name, None if learns is None else nn.Parameter(tensor(name), learns))
    for name, held in about["buffers"].items():
        module.register_buffer(name, tensor(name) if held else None)
    for name, child in about["modules"].items():
        module.add_module(name, None if child is None else _rebuilt(child, state, f"{where}.{name}", shared))
    return module


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _looked_up(name: str) -> type[nn.Module] | None:
    """The class of that name, of those that may be read; None where it is no such one."""
    known: dict[str, Any] = {_name(kind): kind for kind in OTHERS}
    module, _, attribute = name.partition(":")
    if module.startswith(FAMILY):
        try:
            known = {name: getattr(importlib.import_module(module), attribute, None)}
        except ModuleNotFoundError:
            return None
    kind = known.get(name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    return kind if _name(kind) == name else None  # a module knows the names that it imports, too


def _written(value: Any, where: str, shared: Mapping[str, Any]) -> Any:
    """A value as JSON has it: tuples as lists, dtypes and what is shared as objects with their names."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype) and str(value) in DTYPES:
        return {"dtype": str(value)}
    if type(value) is tuple:
        return [_written(part, where, shared) for part in value]
    for name, one in shared.items():
        if value is one:
            return {"shared": name}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which can't be written down: numbers, texts, floating dtypes, and tuples of them can"
    )


def _read(stored: Any, shared: Mapping[str, Any]) -> Any:
    if isinstance(stored, dict):
        return shared[stored["shared"]] if "shared" in stored else DTYPES[stored["dtype"]]
    return tuple(_read(part, shared) for part in stored) if isinstance(stored, list) else stored
