r"""The least and the greatest value of each channel that reaches, or leaves, the modules of a model on calibration data.

Examples:
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> channel_ranges(model, ["0"], [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0], [2.0, 5.0]])])["0"]
    (tensor([ 1., -2.]), tensor([3., 5.]))
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import call

Range = tuple[Tensor, Tensor]


@torch.no_grad()
def channel_ranges(
    model: nn.Module, read: Iterable[str], batches: list[Any], *, made: Iterable[str] = ()
) -> dict[str, Range]:
    """Least and greatest value of each channel over all tokens, float32.

    Args:
        model: in evaluation mode.
        read: names of modules whose inputs are watched.
        batches: at least one.
        made: names of modules whose outputs are watched; none of `read`.

    Returns:
        By name, `[channels]` twice.

    Raises:
        ValueError: the model can't take a batch; a module is never reached, or gets or makes NaN or infinity.
    """
    found: dict[str, Range] = {}

    def note(name: str, values: Tensor) -> None:
        low, high = values.detach().flatten(0, -2).float().aminmax(dim=0)
        if name in found:
            low, high = torch.minimum(found[name][0], low), torch.maximum(found[name][1], high)
        found[name] = (low, high)

    def before(name: str) -> Any:
        return lambda _module, args: note(name, args[0])

    def after(name: str) -> Any:
        return lambda _module, _args, output: note(name, output)

    read, made = list(read), list(made)
    with ExitStack() as hooks:
        for name in read:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(before(name)))
        for name in made:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(after(name)))
        for i, batch in enumerate(batches):
            call(model, batch, i)
    for name in (*read, *made):
        if name not in found:
            raise ValueError(f"the calibration data never reaches layer {name!r}")
    for name, extremes in found.items():  # in the order in which the data reaches them
        if not all(torch.isfinite(extreme).all() for extreme in extremes):
            where = "inputs" if name in read else "outputs"
            raise ValueError(f"the calibration data makes NaN or infinity in the {where} of layer {name!r}")
    return found
