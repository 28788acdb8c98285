"""SpQR: held by the paper's Algorithm 1 written out in numpy, by brute force over left-out weights, and by bytes counted."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.compression.quantization.weight_only.spqr import SpQR, first_level, outlier_gain


def layer(generator, out=20, columns=12, rows=60, dtype=torch.float32):
    """A weight with a few large entries, and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    weight, inputs = (
        torch.randn(out, columns, generator=generator),
        torch.randn(rows, columns, generator=generator) @ mixing,
    )
    weight[torch.rand(out, columns, generator=generator) < 0.05] *= 8
    return weight.to(dtype), inputs.to(dtype)


def error(weight, dense, inputs):
    return float((inputs @ (dense.float() - weight).T).norm() / (inputs @ weight.T).norm())


def half(x):
    return np.float16(x).astype(float)


def second_level(values, bits):
    """Values on grids of sixteen neighbours, step and least value in float16."""
    result = values.copy()
    for at in range(0, len(values), 16):
        part = values[at : at + 16]
        step, least = half((part.max() - part.min()) / (2**bits - 1)), half(part.min())
        code = np.clip(np.round((part - least) / step), 0, 2**bits - 1) if step > 0 else 0 * part
        result[at : at + 16] = least + step * code
    return result


def quantized(w, scale, zero, bits):
    return scale * (np.clip(np.round(w / np.maximum(scale, 1e-9) + zero), 0, 2**bits - 1) - zero)


def group_error(w, u, bits):
    """Hessian-weighted squared error of a group on the grid of its own range."""
    if w.max() == w.min():
        return 0.0
    scale = (w.max() - w.min()) / (2**bits - 1)
    return (((w - quantized(w, scale, -w.min() / scale, bits)) / u) ** 2).sum()


def algorithm_1(weight, inputs, method):
    """The paper's Algorithm 1, as the official code carries it out, row by row and weight by weight, in float64.

    Returns the weight and the mask of outliers.
    """
    w, (out, n) = weight.double().numpy().copy(), weight.shape
    hessian = inputs.double().numpy().T @ inputs.double().numpy()
    order = np.argsort(-np.diag(hessian)) if method.act_order else np.arange(n)
    hessian += method.damping * np.diag(hessian).mean() * np.eye(n)
    w, hessian = w[:, order], hessian[np.ix_(order, order)]
    u = np.linalg.cholesky(np.linalg.inv(hessian)).T
    limit = method.threshold * (w.var(axis=0, ddof=1) / np.diag(u) ** 2).mean()
    result, mask = np.zeros_like(w), np.zeros(w.shape, dtype=bool)
    for j in range(n):
        if j % method.group_size == 0:
            group = slice(j, min(j + method.group_size, n))
            d, low, high = np.diag(u)[group], np.zeros(out), np.zeros(out)
            for i, row in enumerate(w[:, group]):
                base = group_error(row, d, method.bits)
                keep = [
                    k
                    for k in range(len(row))
                    if base - group_error(np.delete(row, k), np.delete(d, k), method.bits) <= limit
                ]
                low[i], high[i] = (row[keep].min(), row[keep].max()) if keep else (0, 0)
            far = np.maximum(low, -high) * (2**method.bits - 1) > 1024 * (
                high - low
            )  # one weight kept, say: the range has 0
            low, high = np.where(far, np.minimum(low, 0), low), np.where(far, np.maximum(high, 0), high)
            scale = (high - low) / (2**method.bits - 1)
            zero = second_level(-low / np.where(scale > 0, scale, 1), method.statistics_bits)
            scale = second_level(scale, method.statistics_bits)
        rounded = quantized(w[:, j], scale, zero, method.bits)
        mask[:, j] = ((w[:, j] - rounded) / u[j, j]) ** 2 > limit
        result[:, j] = np.where(mask[:, j], half(w[:, j]), rounded)
        w[:, j:] -= np.outer((w[:, j] - result[:, j]) / u[j, j], u[j, j:])
    back = np.argsort(order)
    return torch.tensor(result[:, back]), torch.tensor(mask[:, back])


@pytest.mark.parametrize("size", [4, 5, 12])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("threshold", [0.02, 0.06, float("inf")])
def test_equals_the_papers_algorithm(threshold, act_order, size, generator):
    """Oracle: Algorithm 1 in numpy, with each weight left out in turn; 16 does not divide the 20 rows, nor 5 the 12 columns."""
    weight, inputs = layer(generator)
    method = SpQR(group_size=size, act_order=act_order, threshold=threshold)
    packed = method(weight, inputs)
    expected, mask = algorithm_1(weight, inputs, method)
    kept = packed.outliers.put(torch.full((20, 12), float("nan"))).isfinite()
    assert torch.equal(kept, mask)
    assert mask.any() == (threshold < float("inf"))  # negative control: there are some
    assert not mask.all()
    assert_close(
        packed.dense().double(), expected, rtol=1e-3, atol=2e-3
    )  # statistics and outliers are rounded to float16


def test_gain_by_leaving_out_each_weight_in_turn(generator):
    """Oracle: brute force: fit and round each group anew without the weight; only least and greatest move the grid."""
    group, deviation = (
        torch.randn(6, 7, generator=generator, dtype=torch.float64),
        torch.rand(7, generator=generator).double() + 0.5,
    )
    group[0, :2] = group[0].max() + 1  # two greatest: without one of them the grid is the same
    gain = outlier_gain(group, deviation, 2)
    for i, row in enumerate(group.numpy()):
        d = deviation.numpy()
        expected = [group_error(row, d, 2) - group_error(np.delete(row, k), np.delete(d, k), 2) for k in range(7)]
        assert_close(gain[i], torch.tensor(expected))
    assert (gain < 0).any()  # leaving a weight out may do harm to the others
    assert outlier_gain(group[:, :1], deviation[:1], 2).tolist() == [[0.0]] * 6


def test_first_level_by_hand():
    """Oracle: by hand. A range far from 0 for its width is widened; one of zeros has scale 0."""
    low, high = torch.tensor([-1.0, 5.0, 5.0, 0.0, -7.0]), torch.tensor([2.0, 8.0, 5.0, 0.0, -7.0])
    scale, zero = first_level(low, high, 2)
    assert_close(scale, torch.tensor([1.0, 1.0, 5 / 3, 0.0, 7 / 3]))
    assert_close(zero, torch.tensor([1.0, -5.0, 0.0, 0.0, 3.0]))


@pytest.mark.parametrize("act_order", [False, True])
def test_bytes_by_formula(act_order, generator):
    """Oracle: the paper's count, 3 + 6/16 + 64/256 + 32 r bits a weight; rows' starts of 4 bytes and an order of 2 a column besides."""
    weight, inputs = layer(generator, out=32, columns=64, rows=200)
    packed = SpQR(act_order=act_order)(weight, inputs)
    share = len(packed.outliers.value) / weight.numel()
    assert share > 0
    assert 8 * packed.nbytes == (3 + 6 / 16 + 64 / 256 + 32 * share) * weight.numel() + 32 * 33 + 16 * 64 * act_order


def test_outliers_are_what_the_weight_became(generator):
    """Oracle: least squares. Entries kept in 16 bits took the corrections of the columns before them, and make no error of their own."""
    weight, inputs = layer(generator)
    packed = SpQR(threshold=0.05, act_order=False)(weight, inputs)
    mask = packed.outliers.put(torch.full((20, 12), float("nan"))).isfinite()
    first = mask[:, 0]
    assert first.any()
    assert torch.equal(packed.dense()[first, 0], weight[first, 0].half().float())  # nothing came before
    later = mask[:, 6:]
    assert (packed.dense()[:, 6:] - weight[:, 6:])[later].abs().max() > 0.05


def test_columns_without_input_make_no_outliers(generator):
    """Oracle: zero, to the group's step; the other columns are kept as well as without them."""
    weight, inputs = layer(generator)
    inputs[:, [0, 5]] = 0
    weight[:, 5] = 100.0
    packed = SpQR()(weight, inputs)
    mask = packed.outliers.put(torch.full((20, 12), float("nan"))).isfinite()
    assert not mask[:, [0, 5]].any()
    assert packed.dense()[:, 5].abs().max() < 10
    assert error(weight, packed.dense(), inputs) < 0.3


def test_extreme_groups_stay_finite():
    """Oracle: the weight. Zeros, constants and ranges far from zero."""
    weight = torch.zeros(20, 16)
    weight[3], weight[4], weight[5] = 5.0, -3.0, 5.0 + 1e-6 * torch.arange(16)
    dense = SpQR(threshold=float("inf"))(weight, torch.eye(16)).dense()
    assert torch.isfinite(dense).all()
    kept = SpQR(threshold=0.01)(weight, torch.eye(16)).dense()
    assert (kept - weight).abs().max() < 1.5


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float64, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_follows_the_weights_dtype(dtype, stored, generator):
    """Oracle: the float32 result on the same numbers, cast; outliers of a bfloat16 weight are kept in bfloat16."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    packed, same = SpQR()(weight, inputs), SpQR()(weight.float(), inputs.float())
    assert packed.dense().dtype == dtype and packed.outliers.value.dtype == stored
    if stored == torch.float16:  # outliers rounded more coarsely pass on other errors
        assert_close(packed.dense(), same.dense().to(dtype))


def test_one_row_has_no_variance(generator):
    """Oracle: squares stand for it, so that neither none nor all are outliers."""
    weight, inputs = layer(generator, out=1, columns=64, rows=200)
    assert 0 <= len(SpQR()(weight, inputs).outliers.value) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"statistics_bits": 0}, "statistics_bits=0 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"threshold": 0}, "threshold=0 must be positive"),
        ({"damping": -1}, "damping=-1 must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SpQR(**change)


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        (torch.ones(2, 3), None, "SpQR needs the layer's inputs"),
        (torch.full((1, 3), 1e8), torch.ones(5, 3), "beyond torch.float16"),
    ],
)
def test_bad_layers_are_refused(weight, inputs, message):
    with pytest.raises(ValueError, match=message):
        SpQR(bits=2)(weight, inputs)


@pytest.mark.parametrize(("bits", "threshold"), [(2, 2.0), (3, 0.5), (4, 0.5)])
def test_claim_beats_gptq(bits, threshold, claim, generator):
    """Output error over that of GPTQ in groups of 16, in the same order of columns and with more bytes, on the arena's layer with
    outlier channels."""
    weight, inputs = substrate(generator)
    packed = SpQR(bits=bits, threshold=threshold)(weight, inputs)
    gptq = GPTQ(bits=bits, group_size=16, act_order=True)(weight, inputs)
    assert packed.nbytes < gptq.nbytes
    claim(
        "spqr",
        f"beats-gptq-at-{bits}-bits",
        error(weight, packed.dense(), inputs) / error(weight, gptq.dense(), inputs),
    )


def test_claim_beats_rtn(claim, generator):
    """Output error over that of round-to-nearest in groups of 16, 3 bits."""
    weight, inputs = substrate(generator)
    ours = error(weight, SpQR()(weight, inputs).dense(), inputs)
    claim("spqr", "beats-rtn", ours / error(weight, RTN(bits=3, group_size=16)(weight).dense(), inputs))


def test_claim_average_bits(claim, generator):
    """Bits per weight without outliers, on a layer of 256 by 512, order and all."""
    weight, inputs = substrate(generator)
    claim("spqr", "average-bits", 8 * SpQR(threshold=float("inf"))(weight, inputs).nbytes / weight.numel())


def test_claim_outliers_help(claim, generator):
    """Output error with outliers over that without, 3 bits."""
    weight, inputs = substrate(generator)
    errors = [error(weight, SpQR(threshold=t)(weight, inputs).dense(), inputs) for t in (0.2, float("inf"))]
    claim("spqr", "outliers-help", errors[0] / errors[1])


def test_claim_bilevel_is_cheaper(claim, generator):
    """Output error without outliers over that of GPTQ in groups that take as many bytes, 3 bits, columns as they are, on correlated
    inputs of one size; rows' starts, 4 bytes each, count too."""
    mixing = torch.eye(240) + torch.randn(240, 240, generator=generator) / 240**0.5
    weight, inputs = torch.randn(64, 240, generator=generator), torch.randn(480, 240, generator=generator) @ mixing
    ours = SpQR(threshold=float("inf"), act_order=False)(weight, inputs)
    theirs = GPTQ(bits=3, group_size=24)(weight, inputs)
    assert 0.97 < ours.nbytes / theirs.nbytes < 1
    claim("spqr", "bilevel-groups", error(weight, ours.dense(), inputs) / error(weight, theirs.dense(), inputs))
