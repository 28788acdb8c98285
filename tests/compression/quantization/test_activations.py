"""Quantized activations: integers by hand, in int64, and torchao's grids."""

import pytest
import torch
from torch.testing import assert_close
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from refimpl.compression.quantization.activations import (
    Activations,
    IntegerWeight,
    absmax_round,
    exact_product,
    integer_weight,
)
from refimpl.compression.quantization.affine import affine_grid, quantize, to_groups


def randn(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def asymmetric_weight(weight, bits, activations, group_size=8):
    """A weight on the asymmetric grids of its groups, as `rtn` has them."""
    groups = to_groups(weight, "group", group_size)
    scale, zero = affine_grid(groups.amin(1), groups.amax(1), bits, symmetric=False, scale_dtype=torch.float16)
    codes = quantize(groups, scale, zero, bits)
    about = {"bits": bits, "granularity": "group", "shape": tuple(weight.shape), "dtype": weight.dtype}
    return IntegerWeight(codes, scale, zero, activations=activations, **about)


def test_symmetric_by_hand():
    """Oracle: by hand. Steps 127 / 127 and 12.7 / 127; 0.25 / 0.1 = 2.5 ties to 2, -12.66 / 0.1 to -127."""
    codes, scale = Activations().quantize(torch.tensor([[127.0, -2.4, 0.6], [12.7, 0.25, -12.66]]))
    assert codes.tolist() == [[127, -2, 1], [127, 2, -127]]
    assert_close(scale, torch.tensor([[1.0], [0.1]]))


def test_asymmetric_by_hand():
    """Oracle: by hand. [-1, 2] in 3 steps of 1: zero point 1; 0.4 to 0, 1.6 to 2. A row above 0 begins at 0: steps of 2."""
    codes, scale = Activations(bits=2, symmetric=False).quantize(torch.tensor([[-1.0, 0.4, 1.6, 2], [3.0, 4, 6, 5.5]]))
    assert codes.tolist() == [[-1, 0, 2, 2], [2, 2, 3, 3]]
    assert scale.tolist() == [[1.0], [2.0]]


def test_one_grid_for_the_call_and_one_for_all_calls():
    """Oracle: by hand. The largest of the call is 7: steps of 1 with 4 bits. A static grid to 3.5 has steps of 0.5 and clips."""
    inputs = torch.tensor([[7.0, 0.4], [0.6, -1.0]])
    codes, scale = Activations(bits=4, scope="tensor").quantize(inputs)
    assert codes.tolist() == [[7, 0], [1, -1]] and float(scale) == 1
    reach = torch.tensor(-1.0), torch.tensor(3.5)
    held = integer_weight(torch.eye(2), Activations(bits=4, scope="static"), reach=reach)
    assert held.read(inputs).tolist() == [[3.5, 0.5], [0.5, -1.0]]
    assert held.read(100 * inputs).tolist() == [[3.5, 3.5], [3.5, -3.5]]


def test_clipping_by_hand():
    """Oracle: by hand. Half of the range: steps of 0.5, and 7 becomes 3.5."""
    codes, scale = Activations(bits=4, clip=0.5).quantize(torch.tensor([[7.0, 1.0, -0.4]]))
    assert (codes * scale).tolist() == [[3.5, 1.0, -0.5]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_tokens_equal_torchaos(bits, generator):
    """Oracle: torchao's affine primitives (0.18), a block of a row: the same codes, but where dividing and multiplying part."""
    inputs = randn(40, 33, generator=generator)
    scale, zero = choose_qparams_affine(
        inputs, MappingType.ASYMMETRIC, (1, 33), torch.uint8, quant_min=0, quant_max=2**bits - 1
    )
    theirs = quantize_affine(inputs, (1, 33), scale, zero, torch.uint8, 0, 2**bits - 1).float() - zero.view(-1, 1)
    codes, step = Activations(bits=bits, symmetric=False).quantize(inputs)
    assert_close(step.flatten(), scale.flatten())
    assert (codes == theirs).float().mean() > 0.999
    assert len(codes[0].unique()) > 2  # negative control: there is something to compare


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_move_by_half_a_step(bits, symmetric, generator):
    """Oracle: a theorem, rounding inside the range."""
    inputs = randn(9, 17, generator=generator)
    codes, scale = Activations(bits=bits, symmetric=symmetric).quantize(inputs)
    moved = (codes * scale - inputs).abs() / scale
    assert moved.max() <= 0.5 * (1 + 1e-5)
    assert moved.max() > 0.25  # negative control: the step is not needlessly small


@pytest.mark.parametrize("columns", [5, 256, 257, 3000])
def test_products_are_exact(columns, generator):
    """Oracle: int64. With 3,000 columns of odd numbers, sums in float32 alone lose their last bit."""
    x = torch.randint(60, 64, (7, columns), generator=generator).mul_(2).add_(1)
    w = torch.randint(60, 64, (3, columns), generator=generator).mul_(2).add_(1)
    product = exact_product(x.float(), w.float(), 16)
    assert torch.equal(product.long(), x @ w.T)
    if columns == 3000:
        assert not torch.equal((x.float() @ w.float().T).long(), x @ w.T)  # negative control


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scope", ["token", "tensor", "static"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_multiplying_is_the_product_of_read_and_dense(granularity, scope, symmetric, generator):
    """Oracle: `read` and `dense`, multiplied in float64; 300 columns, which neither 7 nor 256 divides; with a bias."""
    weight, inputs, bias = (randn(*shape, generator=generator) for shape in ((6, 300), (2, 5, 300), (6,)))
    reach = (torch.tensor(-2.0), torch.tensor(2.5)) if scope == "static" else None
    activations = Activations(bits=6, scope=scope, symmetric=symmetric)
    held = integer_weight(weight, activations, bits=4, granularity=granularity, group_size=7, reach=reach)
    expected = held.read(inputs).double() @ held.dense().double().T + bias
    assert_close(held.multiply(inputs, bias), expected.float())
    assert_close(held.multiply(inputs[0, 0], bias), (held.read(inputs[0, 0]) @ held.dense().T + bias))
    off = (expected - (inputs @ weight.T + bias)).norm() / expected.norm()
    assert 0.01 < off < 0.6  # negative control: both were rounded


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_asymmetric_weights(bits, generator):
    """Oracle: `read` and `dense`, multiplied in float64, for codes with zero points; 300 is no multiple of 8."""
    held = asymmetric_weight(randn(5, 300, generator=generator), bits, Activations(symmetric=False))
    inputs = randn(4, 300, generator=generator) + 1
    assert_close(held.multiply(inputs), (held.read(inputs).double() @ held.dense().double().T).float())
    assert held.zero is not None


@pytest.mark.parametrize(
    ("bits", "granularity", "nbytes"), [(8, "channel", 320 + 20), (4, "channel", 160 + 20), (4, "group", 160 + 40), (8, "tensor", 324)]
)  # fmt: skip
def test_bytes(bits, granularity, nbytes, generator):
    """Oracle: by hand. 5 x 64 codes of a byte or half of one, and float32 scales for 5 rows, 10 groups, or one tensor."""
    weight = randn(5, 64, generator=generator)
    held = integer_weight(weight, Activations(), bits=bits, granularity=granularity, group_size=32)
    assert held.nbytes == nbytes
    reach = torch.tensor(-1.0), torch.tensor(1.0)
    static = [
        integer_weight(weight, Activations(scope="static", symmetric=s), bits=bits, reach=reach).nbytes
        for s in (True, False)
    ]
    dynamic = integer_weight(weight, Activations(), bits=bits).nbytes
    assert static == [dynamic + 4, dynamic + 8]  # a scale, and a zero point


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_follows_the_inputs_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast once."""
    weight, inputs = (randn(*shape, generator=generator, dtype=dtype) for shape in ((6, 20), (3, 20)))
    held, plain = integer_weight(weight, Activations()), integer_weight(weight.float(), Activations())
    assert held.dense().dtype == held.read(inputs).dtype == dtype
    assert torch.equal(held.multiply(inputs), plain.multiply(inputs.float()).to(dtype))


def test_a_token_does_not_see_the_others(generator):
    """Oracle: the tokens one by one, bit by bit; one that is NaN, and one of zeros."""
    held = integer_weight(randn(6, 300, generator=generator), Activations())
    inputs = randn(4, 300, generator=generator)
    inputs[1], inputs[2] = float("nan"), 0
    together = held.multiply(inputs)
    for row, value in zip(inputs, together, strict=True):
        assert torch.equal(held.multiply(row[None])[0].nan_to_num(7), value.nan_to_num(7))
    assert together[1].isnan().all() and (together[2] == 0).all() and together[[0, 3]].isfinite().all()
    whole = integer_weight(randn(6, 300, generator=generator), Activations(scope="tensor"))
    assert not torch.equal(whole.multiply(inputs[[0]]), whole.multiply(inputs[[0, 3]] * torch.tensor([[1.0], [9]]))[:1])


@pytest.mark.parametrize("scope", ["token", "tensor"])
def test_no_tokens(scope, generator):
    """Oracle: the shape."""
    held = integer_weight(randn(6, 20, generator=generator), Activations(scope=scope))
    assert held.multiply(torch.zeros(0, 20)).shape == (0, 6)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rows_of_zeros_and_tiny_rows(bits):
    """Oracle: by hand. Zeros stay zeros; the largest magnitude keeps its value."""
    integers, scale = absmax_round(torch.tensor([[0.0, 0.0], [1e-20, -3e-20], [-5.0, 1.0]]), bits)
    assert integers[0].tolist() == [0, 0]
    assert_close((integers * scale[:, None])[[1, 2], [1, 0]], torch.tensor([-3e-20, -5.0]))


def test_arguments_are_not_written(generator):
    """Oracle: their values before."""
    weight, inputs = randn(6, 20, generator=generator), randn(3, 20, generator=generator)
    before = weight.clone(), inputs.clone()
    held = integer_weight(weight, Activations(), granularity="group", group_size=4)
    held.multiply(inputs, torch.ones(6))
    assert torch.equal(weight, before[0]) and torch.equal(inputs, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 of activations must be 2 to 8"),
        ({"scope": "row"}, "scope='row' must be 'token', 'tensor' or 'static'"),
        ({"clip": 0}, "clip=0 must be above 0 and at most 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Activations(**change)


def test_a_static_grid_needs_its_range():
    with pytest.raises(ValueError, match="scope='static' needs the grid that calibration found"):
        Activations(scope="static").quantize(torch.ones(1, 2))
    for scope, reach in (("static", None), ("token", (torch.zeros(()), torch.ones(())))):
        with pytest.raises(ValueError, match=f"scope='{scope}': `reach` is for a static scope"):
            integer_weight(torch.ones(2, 2), Activations(scope=scope), reach=reach)
