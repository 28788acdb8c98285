"""Weights on a grid for each row and cluster, products in clusters against the dense product, and outputs rounded from some channel on."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.quantization.clustered import ClusteredWeight, ClusterRounded, clustered_gptq
from refimpl.compression.quantization.clusters import ClusterGrids
from refimpl.compression.quantization.weight_only.gptq import GPTQ

LABELS = torch.tensor([0] * 5 + [1] * 7 + [2] * 8)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_is_rounded_by_gptq_on_a_grid_for_each_row_and_cluster(bits, generator):
    """Oracle: in float64, what is rounded off a column moves those after it by the inverse Hessian of what is free; grids cover the
    weight as it was given, steps of (greatest - least) / (2^bits - 1) with 0 among the levels. Control: plain rounding differs.
    """
    weight, x = torch.randn(6, 20, generator=generator), torch.randn(50, 20, generator=generator)
    x[:, 5:] += x[:, :1]
    weight[:, 12:] *= 30
    held = clustered_gptq(weight, x, LABELS, bits)
    w, hessian, plain = weight.double(), x.double().T @ x.double(), torch.empty(6, 20).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(20)
    for i in range(20):
        own = weight[:, LABELS[i] == LABELS]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        step = held.scale[LABELS[i]]
        assert_close(step.float(), (high - low) / (2**bits - 1), rtol=1e-3, atol=0)  # stored in 16 bits, rounded up
        step = step.double()
        zero = (-low / step).round()
        nearest = lambda v, step=step, zero=zero: ((v / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step  # noqa: E731
        plain[:, i], rounded = nearest(weight[:, i]), nearest(w[:, i])
        inverse = torch.linalg.inv(hessian[i:, i:])
        w[:, i:] -= ((w[:, i] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        w[:, i] = rounded
    assert_close(held.dense().double(), w, rtol=1e-5, atol=1e-5)
    error = lambda v: float(((v - weight.double()) @ x.double().T).square().sum())  # noqa: E731
    assert error(held.dense()) < 0.8 * error(plain)


def test_dead_columns_are_zero(generator):
    """Oracle: GPTQ's rule: a column whose input is always 0 is set to 0; inputs of zeros alone are refused."""
    weight, x = torch.randn(4, 20, generator=generator), torch.randn(50, 20, generator=generator)
    x[:, 3] = 0
    held = clustered_gptq(weight, x, LABELS, 8).dense()
    assert not held[:, 3].any() and held[:, 4].all()
    with pytest.raises(ValueError, match="inputs are all zero"):
        clustered_gptq(weight, torch.zeros(5, 20), LABELS, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product_for_each_cluster_is_the_dense_product(bits, dtype, generator):
    """Oracle: the rounded inputs times the dense weight, in float64; also far from 0, where zero points are large."""
    weight, x = torch.randn(7, 20, generator=generator), torch.randn(30, 20, generator=generator)
    x[:, 12:] += 40
    held = ClusteredWeight(
        clustered_gptq(weight.to(dtype), x, LABELS, bits), ClusterGrids(LABELS, x.amin(0), x.amax(0), bits)
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
    stored = (
        18 * bits + 2 * 21 + 3 * bits + 2 * 20
    )  # eights of 140 codes; 21 float16 scales, eights of zero points; labels
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
