"""QuIP: held by the theorem that LDLQ is GPTQ, by numpy's steps of the algorithm, and by what rotations leave alone."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.hessian import damp, layer_hessian
from refimpl.compression.quantization.rotation import rotations
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.quip import QuIP, ldlq, rescaling
from refimpl.compression.quantization.weight_only.rtn import RTN


def layer(generator, out=6, columns=12, rows=40, dtype=torch.float32):
    """A weight and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    weight, inputs = (
        torch.randn(out, columns, generator=generator),
        torch.randn(rows, columns, generator=generator) @ mixing,
    )
    return weight.to(dtype), inputs.to(dtype)


def error(weight, dense, inputs):
    return float((inputs @ (dense.float() - weight).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [12, 150])
def test_ldlq_is_gptq(bits, columns, generator):
    """Oracle: the paper's Theorem 6. One takes feedback from a factor of H, the other corrections from a factor of its inverse;
    clamping changes nothing, since both aim at the same number. Columns without input are among them."""
    weight, inputs = layer(generator, columns=columns, rows=300)
    inputs[:, 4] = 0
    ours, theirs = QuIP(bits=bits, incoherent=False)(weight, inputs), GPTQ(bits=bits, group_size=None)(weight, inputs)
    assert torch.equal(ours.dense(), theirs.dense())
    assert ours.nbytes == theirs.nbytes
    assert not torch.equal(ours.dense(), RTN(bits=bits, granularity="channel")(weight).dense())  # negative control
    rotated = QuIP(bits=bits)(weight, inputs).dense()
    assert not torch.allclose(rotated, theirs.dense(), atol=0.1)


def ldl_by_elimination(hessian):
    """R and D of H = (R + I) D (R + I)^T, one column after the other from the last, by completing the square."""
    rest, n = hessian.copy(), len(hessian)
    r, d = np.zeros((n, n)), np.zeros(n)
    for k in reversed(range(n)):
        d[k] = rest[k, k]
        r[:k, k] = rest[:k, k] / d[k]
        rest -= d[k] * np.outer(
            np.append(r[:k, k], [1.0] + [0.0] * (n - k - 1)), np.append(r[:k, k], [1.0] + [0.0] * (n - k - 1))
        )
    return r, d


@pytest.mark.parametrize("block", [1, 5, 128])
def test_ldlq_by_its_definition(block, generator):
    """Oracle: Eq. (2) in float64, column by column, with the LDL decomposition by elimination."""
    weight, inputs = layer(generator, dtype=torch.float64)
    hessian = (inputs.T @ inputs).numpy()
    r, d = ldl_by_elimination(hessian)
    np.testing.assert_allclose((r + np.eye(12)) @ np.diag(d) @ (r + np.eye(12)).T, hessian)
    units, expected = weight.numpy() * 2 + 3.5, np.zeros((6, 12))
    for k in range(12):
        wanted = units[:, k] + (units[:, :k] - expected[:, :k]) @ r[:k, k]
        expected[:, k] = np.clip(np.round(wanted), 0, 7)
    codes = ldlq(torch.tensor(units), torch.tensor(hessian), 3, block)
    assert codes.tolist() == expected.tolist()
    assert codes.tolist() != np.clip(np.round(units), 0, 7).tolist()  # negative control


def test_the_error_of_ldlq_without_clamping_is_a_sum_over_d(generator):
    """Oracle: Section 3.1: the proxy error is tr(E D E^T) with E each column's rounding error, at most 1/4 for each entry."""
    weight, inputs = layer(generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    units = weight + 128  # far from both ends of 8 bits
    off = ldlq(units, hessian, 8).double() - units
    _, d = ldl_by_elimination(hessian.numpy())
    ours, nearest = (float((e @ hessian @ e.T).trace()) for e in (off, units.round() - units))
    assert ours <= 6 * d.sum() / 4
    assert ours < nearest  # negative control


@pytest.mark.parametrize("shape", [(6, 12), (7, 5), (1, 9)])
def test_algorithms_1_to_3_written_out(shape, generator):
    """Oracle: numpy, line by line in float64, with dense U and V from the seed; only the rounding of D is ours."""
    weight, inputs = layer(generator, *shape)
    packed = QuIP(bits=3, seed=5)(weight, inputs)
    w, x = weight.double().numpy(), inputs.double().numpy()
    u, v = (
        side.apply(torch.eye(n)).T.double().numpy()
        for side, n in zip(rotations(5, shape, weight.device), shape, strict=True)
    )
    h = x.T @ x
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    d = (np.diag(h) / (w**2).sum(0)) ** 0.25
    np.testing.assert_allclose(packed.rescale.double().numpy(), d / d.max(), rtol=1e-3)  # stored in float16
    d = packed.rescale.double().numpy()
    w, h = u @ (w * d) @ v.T, v @ (h / np.outer(d, d)) @ v.T
    s = 2.4 * np.linalg.norm(w) / np.sqrt(w.size)
    np.testing.assert_allclose(float(packed.scale), s, rtol=1e-5)
    r, _ = ldl_by_elimination(h)
    units, q = np.clip((w / s + 1) / 2 * 7, 0, 7), np.zeros(shape)
    for k in range(shape[1]):
        q[:, k] = np.clip(np.round(units[:, k] + (units[:, :k] - q[:, :k]) @ r[:k, k]), 0, 7)
    expected = u.T @ (s * (q / 7 * 2 - 1)) @ v / d
    assert_close(packed.dense().double(), torch.tensor(expected), rtol=1e-4, atol=1e-4)  # float32 between


def test_rescaling_is_the_best_diagonal(generator):
    """Oracle: the product tr(H') |W'|^2 that it minimizes (Section 4.2), at random other scales; and by hand, (16/1)^(1/4) = 2."""
    weight, inputs = layer(generator)
    hessian = inputs.T @ inputs

    def product(d):
        return float((hessian.diagonal() / d**2).sum() * (weight * d).square().sum())

    best = rescaling(weight, hessian).float()
    assert all(product(best) < product(best * torch.exp(0.3 * torch.randn(12, generator=generator))) for _ in range(20))
    d = rescaling(torch.tensor([[1.0, 1.0]]), torch.diag(torch.tensor([16.0, 1.0])))
    assert d.tolist() == [1.0, 0.5]


def test_rescaling_survives_empty_columns():
    """Oracle: the paper's formula would divide by zero; each energy counts at least 1e-8 of the largest."""
    d = rescaling(torch.tensor([[1.0, 0.0, 1.0]]), torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    assert (d > 0).all() and torch.isfinite(d).all()
    assert d.tolist() == pytest.approx([0.01, 1.0, 0.0001], rel=1e-3)


def test_bytes_by_formula(generator):
    """Oracle: arithmetic: codes, two bytes a column, a scale of four and a seed of eight bytes; no rotation is stored."""
    weight, inputs = layer(generator, 16, 64, 100)
    assert QuIP(bits=3)(weight, inputs).nbytes == 16 * 64 * 3 / 8 + 2 * 64 + 4 + 8


def test_seeds_differ_and_repeat(generator):
    weight, inputs = layer(generator)
    first, again, other = (QuIP(seed=seed)(weight, inputs).dense() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_incoherence_by_its_definition(generator):
    """Oracle: mu of Definition 1, max |W| sqrt(mn) / |W|; a weight with one huge entry has mu near sqrt(mn), a rotated one 3 to 6."""
    weight, inputs = layer(generator, 32, 64, 200)
    weight[3, 5] = 1000.0
    hessian, dead = layer_hessian("QuIP", weight, inputs)
    assert dead.sum() == 0
    u, v = rotations(0, (32, 64), weight.device)
    rotated = u.apply(v.apply(weight).T).T

    def mu(w):
        return float(w.abs().max() * w.numel() ** 0.5 / w.norm())

    assert mu(weight) > 40 and mu(rotated) < 20
    before, after = damp(hessian, dead, 0.01), v.apply(v.apply(damp(hessian, dead, 0.01)).T)
    off = torch.randn(32, 64, generator=generator)
    turned = u.apply(v.apply(off).T).T
    assert_close(
        (off @ before @ off.T).trace(), (turned @ after @ turned.T).trace(), rtol=1e-4, atol=0.0
    )  # 64 terms squared


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast; products keep the inputs' dtype."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    packed = QuIP(bits=4)(weight, inputs)
    assert packed.dense().dtype == packed.multiply(inputs).dtype == dtype
    assert_close(packed.dense(), QuIP(bits=4)(weight.float(), inputs.float()).dense().to(dtype))


def test_a_weight_of_zeros_and_columns_without_input(generator):
    """Oracle: zero is rounded to within a step of a grid of width 0; dead columns do no harm to the product."""
    _, inputs = layer(generator)
    assert_close(QuIP()(torch.zeros(6, 12), inputs).dense(), torch.zeros(6, 12))
    weight, inputs = layer(generator)
    inputs[:, [2, 9]] = 0
    packed = QuIP(bits=4)(weight, inputs)
    assert torch.isfinite(packed.dense()).all()
    assert error(weight, packed.dense(), inputs) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"rho": 0.0}, "rho=0.0 must be positive"),
        ({"damping": -1.0}, "damping=-1.0 must be 0 or more"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        QuIP(**change)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="QuIP needs the layer's inputs"):
        QuIP()(torch.ones(2, 3))
    with pytest.raises(ValueError, match="the Hessian of these inputs is singular: raise damping"):
        QuIP(damping=0, incoherent=False)(torch.ones(2, 3), torch.ones(1, 3))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_claim_beats_gptq(bits, claim, generator):
    """Output error over that of GPTQ on whole channels, on the arena's layer with outlier channels."""
    weight, inputs = substrate(generator)
    ours = error(weight, QuIP(bits=bits)(weight, inputs).dense(), inputs)
    claim(
        "quip",
        f"beats-gptq-at-{bits}-bits",
        ours / error(weight, GPTQ(bits=bits, group_size=None)(weight, inputs).dense(), inputs),
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_claim_beats_rtn(bits, claim, generator):
    """Output error over that of round-to-nearest on whole channels, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours = error(weight, QuIP(bits=bits)(weight, inputs).dense(), inputs)
    plain = error(weight, RTN(bits=bits, granularity="channel")(weight).dense(), inputs)
    claim("quip", f"beats-rtn-at-{bits}-bits", ours / plain)


def test_claim_ldlq_is_optq(claim, generator):
    """Largest difference of any weight between LDLQ and GPTQ on the arena's layer, at 2, 3 and 4 bits."""
    weight, inputs = substrate(generator)
    pairs = [(QuIP(bits=b, incoherent=False), GPTQ(bits=b, group_size=None)) for b in (2, 3, 4)]
    claim(
        "quip",
        "ldlq-is-optq",
        max(float((a(weight, inputs).dense() - b(weight, inputs).dense()).abs().max()) for a, b in pairs),
    )


def test_claim_two_bits(claim, generator):
    """Output error at 2 bits over that of round-to-nearest at 4, whole channels, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours = error(weight, QuIP(bits=2)(weight, inputs).dense(), inputs)
    claim("quip", "two-bits-viable", ours / error(weight, RTN(bits=4, granularity="channel")(weight).dense(), inputs))


def test_claim_overhead(claim, generator):
    """Bits per weight held beyond the codes, on a layer of 256 by 512."""
    weight, inputs = substrate(generator)
    claim("quip", "overhead", 8 * QuIP(bits=2)(weight, inputs).nbytes / weight.numel() - 2)
