"""MSE clipping: never worse than the whole range, held by ACIQ's formula and by the grid search of other codes."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.quantization.affine import affine_grid, dequantize, quantize, to_groups
from refimpl.compression.quantization.observers import best_range, mse_range
from refimpl.compression.quantization.weight_only.mse_clip import MSEClip
from refimpl.compression.quantization.weight_only.rtn import RTN


def laplace(count):
    """Quantiles of the Laplace distribution of scale 1, evenly spaced in probability."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5
    return (-p.sign() * torch.log1p(-2 * p.abs())).float()


def threshold_by_search(values, bits):
    """The best half width of a grid of 2^bits cells of equal size, their centres the levels, as ACIQ models it."""

    def rounded(low, high):
        width = torch.maximum(-low, high) * 2 / 2**bits
        return (values / width).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).add(0.5) * width

    return float(best_range(values, rounded, steps=400)[1])


def threshold_by_formula(bits):
    """ACIQ's: -2 exp(-a) + 2 a / (3 * 4^b) = 0, so that a e^a = 3 * 4^b, solved by Newton's method."""
    a = 3.0
    for _ in range(50):
        a -= (a * math.exp(a) - 3 * 4**bits) / ((a + 1) * math.exp(a))
    return a


@pytest.mark.parametrize(("bits", "known"), [(4, 5.0286), (5, 6.2048)])
def test_the_search_finds_the_best_threshold_of_a_laplace_distribution(bits, known):
    """Oracle: closed form, ACIQ's, a e^a = 3 * 4^b, as the table of its official code has it; candidates are
    0.03 apart. It takes rounding errors for uniform, which they nearly are from 4 bits on."""
    assert threshold_by_formula(bits) == pytest.approx(known, abs=1e-4)
    assert threshold_by_search(laplace(20000), bits) == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_never_worse_than_round_to_nearest(bits, symmetric, granularity, generator):
    """Oracle: a theorem, the whole range is a candidate: group by group the squared error is no larger, and with few bits it is
    smaller. The bytes are the same. The last group is shorter."""
    weight = torch.randn(5, 70, generator=generator)
    form = {"bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": 32}
    ours, plain = MSEClip(**form)(weight), RTN(**form)(weight)
    cut = [to_groups((packed.dense() - weight), granularity, 32).square() for packed in (ours, plain)]
    if granularity == "group":  # what fills a group up is no weight
        cut = [errors.view(5, 3, 32) for errors in cut]
        for errors in cut:
            errors[:, 2, 6:] = 0
    errors = [x.sum(dim=-1) for x in cut]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < (0.98 if bits < 8 else 1.0001) * errors[1].sum()
    assert ours.nbytes == plain.nbytes


def searched(row, bits, symmetric):
    """The grid search that the official code of GPTQ calls `mse`, in numpy: 80 shares of the range, the exponent 2.4."""
    top, low, high = 2**bits - 1, min(row.min(), 0), max(row.max(), 0)
    if symmetric:
        high = max(-low, high)
        low = -high
    least, found = np.inf, row
    for i in range(80):
        scale = (1 - i / 100) * (high - low) / top
        zero = (top + 1) / 2 if symmetric else np.round(-(1 - i / 100) * low / scale)
        rounded = scale * (np.clip(np.round(row / scale) + zero, 0, top) - zero)
        error = (np.abs(rounded - row) ** 2.4).sum()
        if error < least:
            least, found = error, rounded
    return found


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_their_exponent_it_is_the_search_of_gptq(symmetric, generator):
    """Oracle: the official search, written out in numpy, float64; the best share is far above where it ends, at 0.21."""
    weight = torch.randn(6, 40, generator=generator)
    expected = torch.tensor(np.array([searched(row, 3, symmetric) for row in weight.double().numpy()])).float()
    form = {"bits": 3, "symmetric": symmetric, "scale_dtype": torch.float32}
    assert_close(MSEClip(**form, norm=2.4)(weight).dense(), expected)
    assert not torch.allclose(MSEClip(**form, norm=1.0)(weight).dense(), expected)  # negative control


def test_candidates_are_judged_with_the_scale_that_is_stored(generator):
    """Oracle: brute force over all shares, with codes and scales in bfloat16, which moves a step by up to a 128th of it."""
    weight = torch.randn(12, 40, generator=generator)
    low, high = weight.aminmax(dim=1)

    def error(low, high):
        grid = affine_grid(low, high, 6, symmetric=False, scale_dtype=torch.bfloat16)
        return (dequantize(quantize(weight, *grid, 6), *grid) - weight).square().sum(dim=1)

    least = torch.stack([error((1 - i / 100) * low, (1 - i / 100) * high) for i in range(100)]).amin(dim=0)
    ours = MSEClip(bits=6, scale_dtype=torch.bfloat16)(weight).dense()
    assert_close((ours - weight).square().sum(dim=1), least)
    judged_otherwise = error(*mse_range(weight, 6))  # negative control: with scales in float32
    assert (judged_otherwise > 1.01 * least).any()


def test_a_short_last_group_is_searched_for_itself(generator):
    """Oracle: its columns alone, as a weight of their own."""
    weight = torch.randn(4, 21, generator=generator)
    weight[:, -1] = 0.3
    dense = MSEClip(bits=2, granularity="group", group_size=16)(weight).dense()
    alone = MSEClip(bits=2, granularity="group", group_size=5)(weight[:, 16:]).dense()
    assert_close(dense[:, 16:], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight = torch.randn(5, 12, generator=generator).to(dtype)
    dense = MSEClip()(weight).dense()
    assert dense.dtype == dtype
    assert_close(dense, MSEClip()(weight.float()).dense().to(dtype))


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.full((3, 5), 2.5), torch.full((3, 1), -1e-30)])
def test_constant_channels_are_kept(weight):
    """Oracle: closed form: the constant is a level of the whole range, where the error is 0."""
    assert_close(MSEClip(scale_dtype=torch.float32)(weight).dense(), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm": 0}, "norm=0 must be above 0; 2 is the squared error"), ({"bits": 9}, "bits=9 must be 1 to 8")],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        MSEClip(**change)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.full((1, 4), 1e8), r"use scale_dtype=torch\.float32"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        MSEClip(bits=2)(weight)


def test_claim_improves_on_the_range(claim):
    """Squared error of 10,000 numbers of a Laplace distribution at 4 bits, one symmetric grid, over that without clipping."""
    weight = laplace(10000).view(1, -1)
    form = {"bits": 4, "granularity": "tensor", "symmetric": True}
    errors = [float((m(**form)(weight).dense() - weight).square().sum()) for m in (MSEClip, RTN)]
    claim("mse-clip", "improves-on-the-range", errors[0] / errors[1])


def test_claim_formula(claim):
    """Threshold that the search finds on a Laplace distribution at 4 bits, over that of the formula."""
    claim("mse-clip", "formula", threshold_by_search(laplace(20000), 4) / threshold_by_formula(4))


@pytest.mark.parametrize(("name", "bits"), [("no-use-at-8-bits", 8), ("use-at-4-bits", 4)])
def test_claim_use(name, bits, claim):
    """Output error over that of round-to-nearest, a grid for each channel, on the arena's layer: mean over four seeds."""
    ratios = []
    for seed in range(4):
        weight, inputs = substrate(torch.Generator().manual_seed(seed))
        clipped, plain = (
            float((inputs @ (m(bits=bits, granularity="channel")(weight).dense() - weight).T).norm())
            for m in (MSEClip, RTN)
        )
        ratios.append(clipped / plain)
    claim("mse-clip", name, sum(ratios) / len(ratios))
