r"""Grids of activations that are fixed once for all calls, from what calibration data make of a model that is quantized already."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import call
from refimpl.compression.protocol import CompressedLinear


@torch.no_grad()
def average_ranges_(model: nn.Module, batches: list[Any]) -> None:
    """Fix the grids of all quantized inputs anew, in place: from the mean of the batches' least values to that of the greatest.

    What reaches a layer comes from layers that are quantized by the mean so far.

    Args:
        model: one whose quantized layers have fixed grids.
        batches: calibration data.
    """
    low: dict[nn.Module, Tensor] = {}
    high: dict[nn.Module, Tensor] = {}
    done = 0

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, CompressedLinear)
        held: Any = layer.compressed
        least, greatest = args[0].float().aminmax()
        low[layer] = (low.get(layer, 0) * done + least) / (done + 1)
        high[layer] = (high.get(layer, 0) * done + greatest) / (done + 1)
        held.input_scale, zero = held.activations.grid(low[layer], high[layer])
        held.input_zero = None if held.input_symmetric else zero

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, CompressedLinear):
                hooks.enter_context(layer.register_forward_pre_hook(note))
        for i, batch in enumerate(batches):
            call(model, batch, i)
            done += 1
