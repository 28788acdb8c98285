r"""Linear layers of any model: which modules are one, and the weight of each as `[out, in]`.

`torch.nn.Linear` keeps its weight as `[out, in]`; transformers' `Conv1D`, of which GPT-2 is made, keeps `[in, out]`.
"""

from typing import TypeGuard

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as `[in, out]`; known by its name, so that transformers is not needed."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer: a `torch.nn.Linear`, or a `Conv1D`, which differs in its weight's layout."""
    return isinstance(module, nn.Linear) or (module is not None and is_transposed(module))


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer of that name.

    Examples:
        >>> linear_at(nn.Sequential(nn.ReLU(), nn.Linear(5, 7)), "1")
        Linear(in_features=5, out_features=7, bias=True)
    """
    layer = model.get_submodule(path)
    assert is_linear(layer), f"{path} is no linear layer"
    return layer


def sizes(layer: nn.Linear) -> tuple[int, int]:
    """A layer's outputs and inputs.

    Examples:
        >>> sizes(nn.Linear(5, 7))
        (7, 5)
    """
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def weight_of(layer: nn.Linear) -> Tensor:
    """A layer's weight as `[out, in]`: a view of it, without gradient.

    Examples:
        >>> weight_of(nn.Linear(5, 7)).shape
        torch.Size([7, 5])
    """
    weight = layer.weight.detach()
    return weight.T if is_transposed(layer) else weight
