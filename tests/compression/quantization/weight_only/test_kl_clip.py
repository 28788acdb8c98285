"""KL clipping: the threshold is what the observer's tests hold it to; here, what becomes of a weight."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.quantization.activations import Activations, integer_weight
from refimpl.compression.quantization.observers import kl_range
from refimpl.compression.quantization.weight_only.kl_clip import KLClip
from refimpl.compression.quantization.weight_only.rtn import RTN


def tailed(generator, out=3, columns=400):
    """A weight of bell shape with one number far out."""
    weight = torch.randn(out, columns, generator=generator)
    weight[0, 7] = -20.0
    return weight


def divergence_of(counts, levels, i):
    """The slides' definition for one candidate: P with all beyond bin i in the last, Q merged to levels and spread."""
    p, head, level = counts[:i].clone(), counts[:i], torch.arange(i) * levels // i
    p[-1] += counts[i:].sum()
    mass, full = (torch.zeros(levels).double().index_add(0, level, x) for x in (head, (head > 0).double()))
    q = torch.where(head > 0, (mass / full.clamp(min=1))[level], 0.0)
    p, q = p / p.sum(), q / q.sum()
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_are_rounded_up_to_the_threshold(granularity, generator):
    """Oracle: the slides' definition, by which no other threshold is better than T; beyond it a weight gets the outermost level, -2^b / (2^b - 1) of T
    below 0; inside, it moves by half a step at most."""
    weight, bits = tailed(generator), 3
    packed = KLClip(bits=bits, granularity=granularity, scale_dtype=torch.float32)(weight)
    rows = weight.reshape(1, -1) if granularity == "tensor" else weight
    dense = packed.dense().view_as(rows)
    for row, rounded in zip(rows, dense, strict=True):
        largest = float(row.abs().max())
        counts = torch.histc(row.abs(), 2048, 0, largest).double()
        counts[0] = counts[1]
        low, high = kl_range(row, bits)
        threshold = float(torch.maximum(high, -low))
        kept = round(threshold / largest * 2048 - 0.5) if threshold < largest else 2048
        others = [divergence_of(counts, 4, i) for i in range(8, 2049, 8)]
        assert divergence_of(counts, 4, kept) <= min(others) + 1e-9
        step = 2 * threshold / (2**bits - 1)
        inside = row.abs() <= threshold
        assert ((rounded - row)[inside].abs() <= step / 2 * (1 + 1e-4)).all()
        assert float(rounded.min()) >= -(2 ** (bits - 1)) * step * (1 + 1e-5)
    assert float(dense[0].min()) > -10  # negative control: the number far out is clipped
    assert float(RTN(bits=bits, granularity="tensor")(weight).dense().min()) < -15


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_round_to_nearest(bits, generator):
    """Oracle: arithmetic: codes, and one scale of two bytes; with zero points, one more of `bits`, filled up to eight codes."""
    weight = tailed(generator)
    assert KLClip(bits=bits)(weight).nbytes == 1200 * bits / 8 + 2
    assert KLClip(bits=bits, symmetric=False)(weight).nbytes == 1200 * bits / 8 + 2 + bits


def test_one_side_keeps_its_range(generator):
    """Oracle: the weights' own least value, where the threshold lies beyond it: a grid with a zero point does not reach further."""
    weight = tailed(generator).abs()
    held = KLClip(bits=4, symmetric=False, scale_dtype=torch.float32)(weight)
    assert float(held.dense().min()) == 0 and float(held.scale) * 15 == pytest.approx(
        float(kl_range(weight.flatten(), 4)[1])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight = tailed(generator).to(dtype)
    dense = KLClip(bits=4)(weight).dense()
    assert dense.dtype == dtype
    assert_close(dense, KLClip(bits=4)(weight.float()).dense().to(dtype))


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.full((3, 5), 2.5), torch.tensor([[-1.0]])])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_degenerate_weights_stay_near(weight, granularity):
    """Oracle: half a step of the whole range; a single magnitude is never cut."""
    packed = KLClip(bits=8, granularity=granularity, group_size=4, scale_dtype=torch.float32)(weight)
    assert ((packed.dense() - weight).abs() <= weight.abs().max() / 255 * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 1}, "bits=1 must be 2 to 8: with one"), ({"granularity": "row"}, "granularity='row'")],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        KLClip(**change)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        KLClip()(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("name", ["typical-tokens", "all-tokens"])
def test_claim_static_activations(name, claim, generator):
    """Output error of a token with a static 8-bit grid up to the threshold over that with the whole range; the median, or all."""
    weight = torch.randn(32, 64, generator=generator) / 8
    inputs = torch.randn(1000, 64, generator=generator)
    inputs[torch.rand(1000, 64, generator=generator) < 1 / 2000] *= 60
    exact, errors = inputs @ weight.T, []
    for low, high in (kl_range(inputs.flatten(), 8), inputs.aminmax()):
        grid = Activations(scope="static")
        read = integer_weight(torch.eye(64), grid, reach=(low, high)).read(inputs)
        errors.append((read @ weight.T - exact).norm(dim=1))
    ours, whole = errors
    claim(
        "kl-clip",
        name,
        float(ours.median() / whole.median() if name == "typical-tokens" else ours.norm() / whole.norm()),
    )


def test_claim_helps_weights_at_4_bits(claim, generator):
    """Output error over that of round-to-nearest, one grid for the weight, on the arena's layer."""
    weight, inputs = substrate(generator)
    errors = [
        float((inputs @ (m(bits=4, granularity="tensor")(weight).dense() - weight).T).norm()) for m in (KLClip, RTN)
    ]
    claim("kl-clip", "helps-weights-at-4-bits", errors[0] / errors[1])
