"""Linear layers, whichever way round they keep their weight."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from refimpl.model.linear import is_linear, is_transposed, sizes, weight_of


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), Conv1D(7, 5)], ids=["linear", "conv1d"])
def test_weight_is_out_by_in(layer, generator):
    """Oracle: what the layer computes."""
    x = torch.randn(3, 5, generator=generator)
    assert is_linear(layer)
    assert sizes(layer) == (7, 5) == tuple(weight_of(layer).shape)
    assert_close(x @ weight_of(layer).T + layer.bias, layer(x))
    assert is_transposed(layer) == isinstance(layer, Conv1D)
    assert not weight_of(layer).requires_grad


@pytest.mark.parametrize("module", [None, nn.Embedding(3, 4), nn.Conv1d(3, 4, 1), nn.LayerNorm(3)])
def test_nothing_else_is_linear(module):
    """Oracle: by hand; PyTorch's `Conv1d` is a convolution, and its name differs in one letter."""
    assert not is_linear(module)
