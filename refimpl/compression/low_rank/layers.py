r"""The layers of a model that a low-rank *model method* factors, and how one of them is exchanged for its factors.

They are those that `protocol.compress` takes for a layer method: every linear layer but the output layer `lm_head` and those
whose weight stands under a second name.
"""

from torch import nn

from refimpl.compression.protocol import CompressedLinear, CompressedWeight, check_layer, matching
from refimpl.model.linear import weight_of


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to factor by name, in the order in which they stand.

    Raises:
        ValueError: there is none; one is compressed already, holds integers, or NaN or infinity.

    Examples:
        >>> list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0', '2']
    """
    found = matching(model)
    for layer in found.values():
        check_layer(weight_of(layer))
    return found


def replace_weight(model: nn.Module, name: str, weight: CompressedWeight) -> None:
    """Put a compressed weight at the place of a layer's, and keep its bias."""
    model.set_submodule(name, CompressedLinear(weight, model.get_submodule(name).bias))  # type: ignore[arg-type]
