"""HQQ: each of its two steps by its closed form, the rounds by a transcription in numpy, and what its grids must hold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.hqq import HQQ, fitted_zeros, real_codes, real_grid, shrink
from refimpl.compression.quantization.weight_only.rtn import RTN


def test_soft_thresholding_is_the_proximal_step():
    """Oracle: for p = 1, brute force over a grid of e: |e| + beta / 2 (e - x)^2 is least where `shrink` says."""
    grid = torch.arange(-4, 4, 1e-3, dtype=torch.float64)
    for x in (-2.5, -0.2, 0.0, 0.31, 1.0, 3.3):
        best = grid[(grid.abs() + 4.0 / 2 * (grid - x) ** 2).argmin()]
        assert float(shrink(torch.tensor(x), 4.0, 1.0)) == pytest.approx(float(best), abs=1e-3)


@pytest.mark.parametrize("norm", [0.3, 0.7])
def test_shrinking_by_its_closed_form(norm):
    """Oracle: by hand. At |x| = 1 it takes 1 / beta off; it is 0 up to |x| = beta^(-1/(2-p)); large ones lose less than with p = 1."""
    beta = 10.0
    edge = beta ** (-1 / (2 - norm))
    x = torch.tensor([1.0, -1.0, 0.999 * edge, 1.01 * edge, 0.0, 100.0], dtype=torch.float64)
    found = shrink(x, beta, norm)
    assert found[:3].tolist() == pytest.approx([0.9, -0.9, 0.0])
    assert 0 < found[3] < 0.05 and found[4] == 0
    assert 100 > found[5] > shrink(x[5], beta, 1.0)


def test_the_mean_is_the_least_squares_zero_point(generator):
    """Oracle: LAPACK. After one round the zero point is the least-squares solution of s (q - z) = W - W_e, with q and W_e fixed."""
    groups = torch.randn(4, 32, generator=generator, dtype=torch.float64).float()
    groups[:, 0] *= 8
    scale, zero = real_grid(groups, 3, scale_dtype=torch.float32)
    once = fitted_zeros(groups, scale, zero, 3, rounds=1)
    codes = real_codes(groups, scale[:, None], zero[:, None], 3)
    given_up = shrink(groups - (codes - zero[:, None]) * scale[:, None], 10.0, 0.7)
    for row in range(4):
        left = np.full((32, 1), -float(scale[row]))
        right = (groups - given_up - codes * scale[:, None])[row].double().numpy()
        solution = np.linalg.lstsq(left, right, rcond=None)[0]
        assert float(once[row]) == pytest.approx(float(solution[0]), rel=1e-4)
    assert given_up.abs().max() > 0 and not torch.allclose(once, zero, atol=1e-2)  # negative control


def transcribed(weights, bits, norm, rounds):
    """The official loop in numpy, float64: the inverse scale, codes, errors, the stop; the zero points of least error."""
    top = 2**bits - 1
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    inverse = top / (high - low)
    zero = -low * inverse
    if bits == 4:
        zero = np.round(zero)
    beta, best, kept, errors = 10.0, np.inf, zero, []
    for _ in range(rounds):
        q = np.clip(np.round(weights * inverse + zero), 0, top)
        r = (q - zero) / inverse
        error = np.abs(weights - r).mean()
        if error >= best:
            break
        best, kept = error, zero
        errors.append(error)
        x = weights - r
        with np.errstate(divide="ignore"):
            e = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (norm - 1) / beta, 0)
        zero = np.mean(q - (weights - np.where(x == 0, 0, e)) * inverse, axis=1, keepdims=True)
        beta *= 1.01
    return kept[:, 0], errors


@pytest.mark.parametrize("norm", [0.7, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounds_by_a_transcription(bits, norm, generator):
    """Oracle: the loop written out in numpy, float64; and the errors fall from round to round until it ends."""
    weight = 3 * torch.randn(6, 64, generator=generator).abs() ** 1.5  # large enough for errors to be given up
    scale, zero = real_grid(weight, bits, scale_dtype=torch.float32)
    zero = zero.round() if bits == 4 else zero
    expected, errors = transcribed(weight.double().numpy(), bits, norm, 21)
    found = fitted_zeros(weight, scale, zero, bits, norm=norm)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
    assert len(errors) > 1 and errors == sorted(errors, reverse=True)
    assert not torch.allclose(found, zero, atol=0.05)  # negative control


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_more_rounds_never_err_more(bits, generator):
    """Oracle: what is kept: the mean error of 20 rounds is at most that of 5, of 1, of none; and none is the range's grid."""
    weight = torch.randn(8, 64, generator=generator) / 50
    errors = [
        float(
            (HQQ(bits=bits, group_size=16, rounds=r, scale_dtype=torch.float32)(weight).dense() - weight).abs().mean()
        )
        for r in (20, 5, 1, 0)
    ]
    assert errors == sorted(errors) and errors[0] < 0.995 * errors[3]
    low, high = weight.view(-1, 16).aminmax(dim=1)
    start = HQQ(bits=bits, group_size=16, rounds=0, scale_dtype=torch.float32)(weight)
    assert_close(start.scale, (high - low) / (2**bits - 1))
    zero = -low / start.scale
    assert_close(start.real_zero, zero.round() if bits == 4 else zero)


@pytest.mark.parametrize(("bits", "bytes_per_group"), [(4, 32 + 4), (3, 24 + 4), (2, 16 + 4)])
def test_bytes_by_formula(bits, bytes_per_group, generator):
    """Oracle: arithmetic. A group of 64 holds its codes, and 16 bits each for scale and zero point."""
    assert HQQ(bits=bits)(torch.randn(16, 128, generator=generator)).nbytes == 32 * bytes_per_group


def test_a_short_last_group_is_fitted_for_itself(generator):
    """Oracle: its columns alone, for zero points that are not stopped early by the others."""
    weight = torch.randn(4, 21, generator=generator)
    method = {"bits": 2, "rounds": 1}
    dense = HQQ(group_size=16, **method)(weight).dense()
    assert_close(dense[:, 16:], HQQ(group_size=5, **method)(weight[:, 16:]).dense())
    assert_close(dense[:, :16], HQQ(group_size=16, **method)(weight[:, :16]).dense())
    assert HQQ(group_size=None)(weight).scale.shape == (4,)


@pytest.mark.parametrize("bits", [2, 3])
def test_what_fills_a_group_up_does_not_decide_when_to_stop(bits, generator):
    """Oracle: the groups alone; several draws, as not every one would stop elsewhere."""
    moved = []
    for _ in range(4):
        groups = torch.randn(5, 12, generator=generator)
        scale, zero = real_grid(groups, bits, scale_dtype=torch.float32)
        filled, present = (F.pad(x, (0, 20)) for x in (groups, torch.ones_like(groups)))
        alone = fitted_zeros(groups, scale, zero, bits)
        assert_close(fitted_zeros(filled, scale, zero, bits, present=present), alone, rtol=1e-4, atol=1e-4)
        moved.append(float((alone - zero).abs().max()))
    assert max(moved) > 0.1  # negative control


@pytest.mark.parametrize(
    "row", [[0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [-1e-3, -1e-3, -1e-3], [10.0, 10.001, 10.002], [-7.0, -7.0, -6.9]]
)
def test_groups_far_from_zero_stay_near(row):
    """Oracle: half a step. A range as narrow as its distance from 0 allows is kept; a narrower one begins at 0."""
    weight = torch.tensor([row])
    packed = HQQ(bits=8)(weight)
    assert torch.isfinite(packed.real_zero).all()
    far = max(abs(x) for x in row) / 255  # step of a range that begins at 0
    assert (packed.dense() - weight).abs().max() <= 0.6 * far


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight = torch.randn(5, 40, generator=generator).to(dtype)
    packed = HQQ(group_size=16)(weight)
    assert packed.dense().dtype == dtype and packed.real_zero.dtype == torch.float16
    assert_close(packed.dense(), HQQ(group_size=16)(weight.float()).dense().to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
        ({"norm": 2.0}, "norm=2.0 must be above 0 and at most 1; the official code uses 0.7"),
        ({"rounds": -1}, "rounds=-1 must be 0 or more"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        HQQ(**change)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinity"),
        (torch.tensor([[1e8, -1e8]]), r"use scale_dtype=torch\.float32"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        HQQ(bits=2)(weight)


def lost(weight, dense):
    return float((dense - weight).abs().pow(0.7).mean())


def moved(weight, dense, inputs):
    return float((inputs @ (dense - weight).T).norm())


def test_claim_fits(claim, generator):
    """Mean |error|^0.7 of the weights at 3 bits, over that of the zero points of the range, on the arena's layer."""
    weight, _ = substrate(generator)
    claim(
        "hqq",
        "fits-at-3-bits",
        lost(weight, HQQ(bits=3)(weight).dense()) / lost(weight, HQQ(bits=3, rounds=0)(weight).dense()),
    )


def test_claim_beats_rtn(claim, generator):
    """Output error at 3 bits in groups of 64, over that of round-to-nearest, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours, plain = HQQ(bits=3)(weight).dense(), RTN(bits=3, group_size=64)(weight).dense()
    claim("hqq", "beats-rtn-at-3-bits", moved(weight, ours, inputs) / moved(weight, plain, inputs))


def test_claim_norm_matters(claim, generator):
    """Mean |error|^0.7 with p = 0.7 over that with p = 1, at 4 bits, on weights of standard deviation 0.02 with rare larger ones."""
    weight = 0.02 * torch.randn(64, 512, generator=generator)
    weight[torch.rand(64, 512, generator=generator) < 0.01] *= 5
    claim("hqq", "norm-matters", lost(weight, HQQ()(weight).dense()) / lost(weight, HQQ(norm=1.0)(weight).dense()))


def test_claim_near_gptq(claim, generator):
    """Output error at 4 bits in groups of 64, over that of GPTQ, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours, theirs = HQQ()(weight).dense(), GPTQ(group_size=64)(weight, inputs).dense()
    claim("hqq", "near-gptq", moved(weight, ours, inputs) / moved(weight, theirs, inputs))
