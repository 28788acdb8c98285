"""GPTQ: held by the procedure that it speeds up, written out, and by least squares."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.hessian import gram, inverse_factor
from refimpl.compression.protocol import compress
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN


def layer(generator, out=5, columns=12, rows=40):
    """A weight and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    return torch.randn(out, columns, generator=generator), torch.randn(rows, columns, generator=generator) @ mixing


def error(weight, dense, inputs):
    return float((inputs @ (dense.float() - weight).T).norm() / (inputs @ weight.T).norm())


def grid(values, bits, symmetric):
    """Scale and zero point of one group, from the definition."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if symmetric:
        high = max(-low, high)
        low = -high
    exact = (high - low) / (2**bits - 1)
    half = np.float16(exact)
    scale = float(
        half if float(half) >= exact else np.nextafter(half, np.float16(np.inf))
    )  # rounded up, as the class states
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def rounded(value, scale, zero, bits):
    return scale * (min(max(round(float(value) / scale) + zero, 0), 2**bits - 1) - zero)


def obq(weight, inputs, order, size, static, bits=3, damping=0.01, symmetric=False):
    """OBQ in a fixed order, in float64: after each weight the inverse Hessian loses its row and column by Gauss's elimination."""
    hessian = inputs.double().T @ inputs.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    result = weight.double().clone()
    for row in result:
        original, inverse, grids = row.clone(), torch.linalg.inv(hessian), {}
        for j in order:
            group = slice(j // size * size, (j // size + 1) * size)
            if group.start not in grids:
                grids[group.start] = grid((original if static else row)[group], bits, symmetric)
            q = rounded(row[j], *grids[group.start], bits)
            row -= (row[j] - q) / inverse[j, j] * inverse[:, j]
            row[j] = q
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j].clone()
            inverse[j], inverse[:, j] = 0.0, 0.0  # what is left of them is rounding
    return result


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [4, 5, 12])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_obq_in_a_fixed_order(act_order, size, symmetric, generator):
    """Oracle: OBQ with inverse-Hessian downdates, row by row in float64; 5 does not divide 12."""
    weight, inputs = layer(generator)
    method = GPTQ(bits=3, group_size=size, symmetric=symmetric, act_order=act_order)
    order = inputs.square().sum(0).argsort(descending=True).tolist() if act_order else range(12)
    expected = obq(weight, inputs, order, size, static=act_order, symmetric=symmetric)
    assert_close(method(weight, inputs).dense().double(), expected, rtol=1e-4, atol=1e-5)  # float32 through 12 steps
    rtn = RTN(bits=3, group_size=size, symmetric=symmetric)(weight).dense()
    assert not torch.allclose(method(weight, inputs).dense(), rtn)  # negative control: errors are passed on


def test_every_column_is_what_least_squares_would_have_there(generator):
    """Oracle: least squares. Given the columns rounded so far, the next is rounded from the optimum over all that are free."""
    weight, inputs = layer(generator)
    dense = GPTQ(bits=3, group_size=None)(weight, inputs).dense().double()
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    scales = [grid(row, 3, symmetric=False) for row in weight.double()]
    for j in range(12):
        moved = dense[:, :j] - weight[:, :j].double()
        free = weight[:, j:].double() - torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ moved.T).T
        expected = torch.tensor([rounded(w, *s, 3) for w, s in zip(free[:, 0], scales, strict=True)])
        assert_close(dense[:, j].float(), expected, rtol=1e-4, atol=1e-5)  # as above


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [7, None])
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_give_rtn(bits, size, act_order, generator):
    """Oracle: closed form. A diagonal Hessian passes nothing on, so that GPTQ contains RTN; its `generalizes` relation."""
    weight, inputs = torch.randn(6, 20, generator=generator), torch.diag(torch.rand(20, generator=generator) + 0.1)
    ours = GPTQ(bits=bits, group_size=size, act_order=act_order)(weight, inputs)
    theirs = RTN(bits=bits, group_size=size or 20)(weight)
    assert torch.equal(ours.dense(), theirs.dense())
    assert ours.nbytes == theirs.nbytes
    correlated = GPTQ(bits=bits, group_size=size, act_order=act_order)(weight, inputs + 0.2)
    assert not torch.equal(correlated.dense(), theirs.dense())  # negative control


def test_worked_by_hand():
    """Oracle: by hand. Two inputs are equal, so 0.4 rounded down to 0 is added to the second weight: 0.8 rounds to 1. The
    third input is apart, and sets the grid 0, 1, 2, 3."""
    weight, inputs = torch.tensor([[0.4, 0.4, 3.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert GPTQ(bits=2, group_size=None)(weight, inputs).dense().tolist() == [[0.0, 1.0, 3.0]]
    assert RTN(bits=2, granularity="channel")(weight).dense().tolist() == [[0.0, 0.0, 3.0]]


@pytest.mark.parametrize("size", [32, 50, 300])
@pytest.mark.parametrize("act_order", [False, True])
def test_lazy_blocks_change_nothing(size, act_order, generator):
    """Oracle: the same sweep with blocks of one column; groups begin inside blocks, at their edges and across them."""
    weight, inputs = layer(generator, 8, 300, 600)
    method = GPTQ(bits=4, group_size=size, act_order=act_order)
    hessian = gram(inputs)
    order = hessian.diagonal().argsort(descending=True) if act_order else None
    factor = inverse_factor(hessian, torch.zeros(300, dtype=torch.bool), 0.01, order)
    lazy, eager = (method._sweep(weight.T.clone(), factor, size, order, block) for block in (128, 1))
    assert (lazy[0] == eager[0]).float().mean() > 0.99  # a tie may fall either way, and moves what follows it
    assert_close(lazy[1], eager[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_columns_without_input_are_zero_and_disturb_nothing(damping, act_order, generator):
    """Oracle: the layer without these columns. 0 is in every grid, so that a channel's other weights are the same."""
    weight, inputs = layer(generator)
    dead, alive = [0, 5, 6, 7, 11], [1, 2, 3, 4, 8, 9, 10]
    inputs[:, dead] = 0
    weight[:, 5] = 100.0  # would ruin the channel's grid
    method = GPTQ(bits=3, group_size=None, act_order=act_order, damping=damping)
    dense = method(weight, inputs).dense()
    assert torch.equal(dense[:, alive], method(weight[:, alive], inputs[:, alive]).dense())
    assert (dense[:, dead] == 0).all()


def test_the_unit_of_the_inputs_does_not_matter(generator):
    """Oracle: the error is quadratic in it, and damping is relative. A power of two rounds nothing."""
    weight, inputs = layer(generator)
    inputs[:, 3] = 0
    assert torch.equal(GPTQ()(weight, inputs).dense(), GPTQ()(weight, 1024 * inputs).dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    dense = GPTQ(bits=4, group_size=4)(weight, inputs).dense()
    assert dense.dtype == dtype
    assert_close(dense, GPTQ(bits=4, group_size=4)(weight.float(), inputs.float()).dense().to(dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_columns(rows, generator):
    """Oracle: the error of rounding. Damping makes the Hessian invertible; the inputs' few directions are kept better."""
    weight, inputs = layer(generator, rows=rows)
    assert error(weight, GPTQ(bits=3)(weight, inputs).dense(), inputs) < error(
        weight, RTN(bits=3)(weight).dense(), inputs
    )


def test_a_weight_of_one_row_is_not_written(generator):
    """Oracle: the weight before. Its transpose lies in memory as it does."""
    weight, inputs = layer(generator, out=1, columns=150, rows=200)
    inputs[:, 3] = 0
    before = weight.clone()
    GPTQ(bits=2)(weight, inputs)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("size", [32, 48, None])
def test_storage_is_that_of_rtn(size, generator):
    """Oracle: RTN's, byte for byte; the order of visits needs no room."""
    weight, inputs = layer(generator, 6, 128, 200)
    rtn = RTN(bits=3, group_size=size or 128)(weight).nbytes
    assert {GPTQ(bits=3, group_size=size, act_order=order)(weight, inputs).nbytes for order in (False, True)} == {rtn}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
        ({"damping": -0.1}, "damping=-0.1 must be 0 or more"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**change)


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        (torch.ones(2, 3), None, "needs the layer's inputs: pass `inputs`, or `calibration`"),
        (torch.ones(2, 3), torch.ones(5, 4), r"inputs of shape \(5, 4\) must be \[n, in\] with n >= 1 and in = 3"),
        (torch.ones(2, 3), torch.ones(0, 3), "n >= 1"),
        (torch.ones(2, 3), torch.ones(1, 5, 3), "must be"),
        (torch.ones(2, 3), torch.full((5, 3), float("nan")), "inputs hold NaN or infinity"),
        (torch.ones(2, 3), torch.zeros(5, 3), "inputs are all zero"),
        (torch.full((2, 3), float("inf")), torch.ones(5, 3), "weight holds NaN or infinity"),
        (torch.ones(3), torch.ones(5, 3), "must be a matrix"),
        (torch.full((1, 3), 1e8), torch.ones(5, 3), "use scale_dtype=torch.float32"),
    ],
)
def test_bad_layers_are_refused(weight, inputs, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(bits=2)(weight, inputs)


def test_a_singular_hessian_is_refused():
    with pytest.raises(ValueError, match="damping=0 leaves the Hessian of these inputs singular: raise it"):
        GPTQ(damping=0)(torch.ones(2, 3), torch.ones(1, 3))


def test_with_a_model_merged_from_lora(generator):
    """Oracle: RTN on the same model. The relation `composes_with`: LoRA first, merged, then GPTQ."""
    from refimpl.finetuning.peft.lora.lora import LoRA

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
    lora = LoRA(rank=2, target=("*",))
    lora.inject(model, generator)
    with torch.no_grad():
        for factor in lora.trainable(model).values():
            factor.add_(0.2 * torch.randn(factor.shape, generator=generator))
    merged = lora.merge(copy.deepcopy(model))
    x = torch.randn(200, 32, generator=generator)
    expected = model(x).detach()
    off = [
        float((compress(merged, method, [x])(x) - expected).norm())
        for method in (GPTQ(bits=3, group_size=16), RTN(bits=3, group_size=16))
    ]
    assert off[0] < off[1] < expected.norm() / 2


def plain(weight, inputs, bits=4, size=128, block=128):
    """The authors' procedure in plain PyTorch: Hessian, twice Cholesky, blocks of columns, one column after the other."""
    hessian = 2 / len(inputs) * inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left, result = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], block):
        part, off = (
            left[:, start : start + block].clone(),
            torch.zeros(len(weight), min(block, weight.shape[1] - start)),
        )
        inner = factor[start : start + block, start : start + block]
        for i in range(part.shape[1]):
            if (start + i) % size == 0:
                group = part[:, i : i + size] if size <= block else left[:, start + i : start + i + size]
                low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
                scale = (high - low) / (2**bits - 1)
                zero = torch.round(-low / scale)
            column = part[:, i]
            q = scale * (torch.clamp(torch.round(column / scale) + zero, 0, 2**bits - 1) - zero)
            result[:, start + i] = q
            off[:, i] = (column - q) / inner[i, i]
            part[:, i:] -= off[:, i : i + 1] @ inner[i : i + 1, i:]
        left[:, start + block :] -= off @ factor[start : start + block, start + block :]
    return result


def test_beside_the_authors_procedure(peer, measured_layer, generator):
    """Oracle: their procedure in plain PyTorch; there is no package of it that runs here. In float32 a weight halfway between two
    levels may fall either way, and all after it; so the output's errors are compared."""
    weight, inputs = layer(generator, *measured_layer)
    method = GPTQ(bits=4, group_size=128, scale_dtype=torch.float32)
    peer(
        "gptq",
        "their procedure, written out in torch",
        f"quantize {weight.shape[0]} by {weight.shape[1]} with {len(inputs)} inputs, 4 bits in groups of 128: relative output error; ours packs",
        lambda: torch.tensor(error(weight, method(weight, inputs).dense(), inputs)),
        lambda: torch.tensor(error(weight, plain(weight, inputs), inputs)),
        within=1e-3,
    )


@pytest.mark.parametrize(("bits", "name"), [(2, "beats-rtn-at-2-bits"), (3, "beats-rtn"), (4, "beats-rtn-at-4-bits")])
def test_claim_beats_rtn(bits, name, claim, generator):
    """Output error over that of round-to-nearest, on whole channels of the arena's layer."""
    weight, inputs = substrate(generator)
    ours = GPTQ(bits=bits, group_size=None)(weight, inputs).dense()
    plain = RTN(bits=bits, granularity="channel")(weight).dense()
    claim("gptq", name, error(weight, ours, inputs) / error(weight, plain, inputs))


def test_claim_act_order(claim, generator):
    """Output error with the order of falling activations over that with the given order, on a layer with outlier channels."""
    weight, inputs = substrate(generator)
    ordered, given = (GPTQ(bits=3, group_size=None, act_order=o)(weight, inputs).dense() for o in (True, False))
    claim("gptq", "act-order", error(weight, ordered, inputs) / error(weight, given, inputs))


def test_claim_groups_at_2_bits(claim, generator):
    """Output error of groups of 32 over that of groups of 128, 2 bits."""
    weight, inputs = substrate(generator)
    small, large = (GPTQ(bits=2, group_size=size)(weight, inputs).dense() for size in (32, 128))
    claim("gptq", "groups-at-2-bits", error(weight, small, inputs) / error(weight, large, inputs))


def greedy(weight, inputs, bits):
    """OBQ as its paper has it: each row rounds the weight that costs least next. In float64, all rows at once."""
    rows, columns = weight.shape
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian).repeat(rows, 1, 1)
    w, done, row = weight.double().clone(), torch.zeros(rows, columns, dtype=torch.bool), torch.arange(rows)
    scale, zero = torch.tensor([grid(channel, bits, False) for channel in w], dtype=torch.float64).T[..., None]
    for _ in range(columns):
        q = scale * ((w / scale).round().add(zero).clamp(0, 2**bits - 1) - zero)
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        j = ((w - q).square() / diagonal).masked_fill(done, float("inf")).argmin(dim=1)
        column = inverse[row, :, j]
        pivot = diagonal[row, j][:, None].clone()
        change = (w - q)[row, j][:, None] / pivot * column
        w = torch.where(done, w, w - change)
        w[row, j] = q[row, j]
        done[row, j] = True
        inverse = inverse - column[:, :, None] * column[:, None, :] / pivot[..., None]
        inverse[row, j, j] = 1.0  # its turn is over
    return w.float()


def test_claim_order_hardly_matters(claim, generator):
    """Output error of the given order over that of OBQ's greedy one, 4 bits, on a layer of 64 columns."""
    weight, inputs = layer(generator, 32, 64, 400)
    given = GPTQ(bits=4, group_size=None)(weight, inputs).dense()
    claim(
        "gptq", "order-hardly-matters", error(weight, given, inputs) / error(weight, greedy(weight, inputs, 4), inputs)
    )
