"""Fixed grids as means over batches: by hand."""

import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.activations import Activations, integer_weight
from refimpl.compression.quantization.static_ranges import average_ranges_


def test_ranges_are_means_of_the_batches_extremes():
    """Oracle: by hand. Least -1 and -3, greatest 2 and 6: a grid from -2 to 4, of 15 steps of 0.4."""
    activations = Activations(bits=4, scope="static", symmetric=False)
    held = integer_weight(torch.eye(2), activations, reach=(torch.tensor(-9.0), torch.tensor(9.0)))
    model = nn.Sequential(CompressedLinear(held, None))
    average_ranges_(model, [torch.tensor([[-1.0, 2.0], [0.0, 1.0]]), torch.tensor([[6.0, -3.0]])])
    assert_close(held.input_scale, torch.tensor(0.4))
    assert_close(held.input_zero, torch.tensor(5.0))
    assert held.read(torch.tensor([0.5, 9.0])).tolist() == torch.tensor([0.4, 4.0]).tolist()
    assert not model[0]._forward_pre_hooks
