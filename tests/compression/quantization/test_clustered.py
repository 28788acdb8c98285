"""Products in clusters against the dense product, and outputs that are rounded from some channel on."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.quantization.clustered import ClusteredWeight, ClusterRounded
from refimpl.compression.quantization.clusters import ClusterGrids
from refimpl.compression.quantization.weight_only.gptq import GPTQ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product_for_each_cluster_is_the_dense_product(bits, dtype, generator):
    """Oracle: the rounded inputs times the dense weight, in float64; also far from 0, where zero points are large."""
    weight, x = torch.randn(7, 20, generator=generator), torch.randn(30, 20, generator=generator)
    x[:, 12:] += 40
    labels = torch.tensor([0] * 5 + [1] * 7 + [2] * 8)
    held = ClusteredWeight(
        GPTQ(bits=bits, group_size=None)(weight.to(dtype), x), ClusterGrids(labels, x.amin(0), x.amax(0), bits)
    )
    x = x.to(dtype)
    bias = torch.randn(7, generator=generator).to(dtype)
    expected = held.grids.read(x.double()) @ held.stored.dense().double().T + bias
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]  # sums of 20 numbers near 40
    assert_close(
        held.multiply(x.view(5, 6, 20), bias).double().view(30, 7),
        expected,
        rtol=1e-2 if dtype != torch.float32 else 1e-5,
        atol=tolerance,
    )
    assert held.multiply(x).dtype == dtype and held.dense().dtype == dtype
    stored = 18 * bits + 2 * 7 + bits  # eights of 140 codes, seven float16 scales, an eight of zero points
    assert held.nbytes == stored + 2 * 20 + 3 * (4 + 4)  # labels; a scale and a zero point for each cluster


def test_last_outputs_are_rounded_and_the_first_stay(generator):
    """Oracle: the layer without it, and `ClusterGrids`."""
    weight, x = torch.randn(6, 9, generator=generator), torch.randn(12, 9, generator=generator)
    plain = nn.Linear(9, 6)
    stored = GPTQ(bits=8, group_size=None)(weight, x)
    made = x @ stored.dense().T + plain.bias.detach()
    grids = ClusterGrids(torch.tensor([0, 0, 1, 1]), made.amin(0)[2:], made.amax(0)[2:], 3)
    layer = ClusterRounded(stored, plain.bias, grids)
    assert_close(layer(x)[:, :2], made[:, :2])
    assert_close(layer(x)[:, 2:], grids.read(made[:, 2:]))
    assert len(layer(x)[:, 2:4].unique()) <= 8 < len(made[:, 2:4].unique())
