"""OBQ: held by least squares solved anew at every step, by brute force over all orders, and by GPTQ in a fixed order."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.quantization.grid_search import shrunk_grid
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.obq import OBQ
from refimpl.compression.quantization.weight_only.rtn import RTN


def layer(generator, out=5, columns=12, rows=40, dtype=torch.float32):
    """A weight and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    weight = torch.randn(out, columns, generator=generator)
    return weight.to(dtype), (torch.randn(rows, columns, generator=generator) @ mixing).to(dtype)


def error(weight, dense, inputs):
    return float((inputs @ (dense - weight).T).norm() / (inputs @ weight.T).norm())


def damped(inputs, damping=0.01):
    hessian = inputs.double().T @ inputs.double()
    return (hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))).numpy()


def on_grid(w, scale, zero, bits):
    return scale * (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero)


def refit(row, hessian, done, values):
    """The row with some weights set to values, and all others where the error is least: least squares, solved from scratch."""
    free = [j for j in range(len(row)) if j not in done]
    moved = np.array([values[j] - row[j] for j in done])
    best = row.copy()
    best[done] = [values[j] for j in done]
    if free:
        best[free] -= np.linalg.solve(hessian[np.ix_(free, free)], hessian[np.ix_(free, done)] @ moved)
    change = best - row
    return best, change @ hessian @ change


def from_scratch(row, hessian, scale, zero, bits):
    """The paper's procedure without any formula of it: the next weight is the one after whose rounding, and a new least-squares fit of all
    that are free, the error has grown least; unless one lies more than half a step off the grid."""
    done, values, current = [], {}, row.copy()
    while len(done) < len(row):
        rounded = on_grid(current, scale, zero, bits)
        off = {j: abs(rounded[j] - current[j]) for j in range(len(row)) if j not in done}
        if max(off.values()) > scale / 2 * (1 + 1e-9):
            chosen = max(off, key=off.get)
        else:
            chosen = min(off, key=lambda j: refit(row, hessian, [*done, j], {**values, j: rounded[j]})[1])
        done.append(chosen)
        values[chosen] = rounded[chosen]
        current, _ = refit(row, hessian, done, values)
    return current


@pytest.mark.parametrize("grid", ["clipped", "range"])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("damping", [0.01, 0.2])
@pytest.mark.parametrize("steps", [2, 64])
def test_equals_the_greedy_choice_made_from_scratch(grid, bits, damping, steps, generator, monkeypatch):
    """Oracle: every candidate of every step refitted by least squares, in float64, with no inverse and no downdate."""
    monkeypatch.setattr("refimpl.compression.quantization.weight_only.obq.STEPS", steps)
    weight, inputs = layer(generator, out=35, columns=7, dtype=torch.float64)  # more than a block of rows
    packed = OBQ(bits=bits, grid=grid, damping=damping, scale_dtype=torch.float32)(weight, inputs)
    hessian = damped(inputs, damping)
    zeros = torch.round(-weight.clamp(max=0).amin(1) / packed.scale) if grid == "range" else None
    if grid == "clipped":
        zeros = shrunk_grid(weight, bits, symmetric=False, scale_dtype=torch.float32)[1]
    expected = [
        from_scratch(row, hessian, scale, zero, bits)
        for row, scale, zero in zip(weight.numpy(), packed.scale.double().numpy(), zeros.double().numpy(), strict=True)
    ]
    assert_close(packed.dense(), torch.tensor(np.array(expected)), rtol=1e-6, atol=1e-6)  # float32 in `dense`
    given = OBQ(bits=bits, grid=grid, damping=damping, order="given", scale_dtype=torch.float32)(weight, inputs)
    assert not torch.equal(packed.dense(), given.dense())  # negative control: the order matters


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_obq_in_the_given_order(bits, symmetric, generator):
    """Oracle: GPTQ's theorem (Section 4, Steps 1 and 3): rows in one order share an inverse, and a Cholesky factor holds it."""
    weight, inputs = layer(generator, out=40, columns=33, rows=100)
    ours = OBQ(bits=bits, symmetric=symmetric, grid="range", order="given")(weight, inputs)
    theirs = GPTQ(bits=bits, symmetric=symmetric, group_size=None)(weight, inputs)
    assert torch.equal(ours.dense(), theirs.dense())
    assert ours.nbytes == theirs.nbytes
    greedy = OBQ(bits=bits, symmetric=symmetric, grid="range")(weight, inputs)
    assert not torch.equal(ours.dense(), greedy.dense())  # negative control


def test_its_end_is_that_of_an_order_of_the_better_half(generator):
    """Oracle: brute force over all orders of five weights, each refitted by least squares: one of them ends where the greedy one does,
    and at most half of them end with a smaller error. The least of all it need not be."""
    weight, inputs = layer(generator, out=1, columns=5, dtype=torch.float64)
    packed = OBQ(bits=2, grid="range", scale_dtype=torch.float32)(weight, inputs)
    scale, zero, hessian = float(packed.scale), round(float(-weight.clamp(max=0).min() / packed.scale)), damped(inputs)
    row, ends = weight[0].numpy(), []
    for order in itertools.permutations(range(5)):
        current, values = row, {}
        for t, j in enumerate(order):
            values[j] = on_grid(current[j], scale, zero, 2)
            current, cost = refit(row, hessian, list(order[: t + 1]), values)
        ends.append((cost, current))
    assert any(np.allclose(packed.dense()[0].numpy(), end, atol=1e-6) for _, end in ends)
    ours = (packed.dense() - weight)[0].numpy()
    costs = sorted(cost for cost, _ in ends)
    assert costs[0] - 1e-9 <= ours @ hessian @ ours <= costs[len(costs) // 2] + 1e-9


def test_worked_by_hand():
    """Oracle: by hand. The third weight is a level. Inputs of the others are equal: 0.9 is cheaper (0.1 against 0.4) and becomes 1;
    what it gained is taken from the other, 0.3, which becomes 0. In the given order 0.4 goes first, and 0.9 takes 0.4: 1.3, so 1."""
    weight, inputs = torch.tensor([[0.4, 0.9, 3.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert OBQ(bits=2, grid="range")(weight, inputs).dense().tolist() == [[0.0, 1.0, 3.0]]
    weight = torch.tensor(
        [[0.4, 0.2, 3.0]]
    )  # 0.2 to 0 first, then 0.6 to 1; in the given order 0.4 to 0, then 0.6 to 1
    assert OBQ(bits=2, grid="range")(weight, inputs).dense().tolist() == [[1.0, 0.0, 3.0]]
    assert OBQ(bits=2, grid="range", order="given")(weight, inputs).dense().tolist() == [[0.0, 1.0, 3.0]]


def test_what_is_pushed_off_the_grid_goes_first():
    """Oracle: by hand. Grid 0 to 3 by clipping is set aside; 3.4 lies 0.4 steps beyond it and waits, 3.6 would not."""
    method = OBQ(bits=2)
    error = torch.tensor([[0.1, 0.4, -0.2], [0.1, 0.6, -0.2]])
    diagonal = torch.tensor([[1.0, 9.0, 9.0], [1.0, 1.0, 9.0]])
    free = torch.ones(2, 3, dtype=torch.bool)
    choice = method._choice(error, diagonal, torch.ones(2, 1), free)
    assert choice.tolist() == [2, 1]  # 0.04 / 9 is least; 0.6 is more than half a step
    assert OBQ(order="given")._choice(error, diagonal, torch.ones(2, 1), free).tolist() == [0, 0]
    free[0, 2] = free[1, 1] = free[:, 0] = False  # what is done is not chosen again
    assert method._choice(error, diagonal, torch.ones(2, 1), free).tolist() == [1, 2]
    assert OBQ(order="given")._choice(error, diagonal, torch.ones(2, 1), free).tolist() == [1, 2]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("order", ["greedy", "given"])
def test_uncorrelated_inputs_give_rtn(bits, order, generator):
    """Oracle: closed form. A diagonal Hessian corrects nothing; its `generalizes` relation."""
    weight, inputs = torch.randn(6, 20, generator=generator), torch.diag(torch.rand(20, generator=generator) + 0.1)
    ours = OBQ(bits=bits, grid="range", order=order)(weight, inputs)
    theirs = RTN(bits=bits, granularity="channel")(weight)
    assert torch.equal(ours.dense(), theirs.dense())
    assert ours.nbytes == theirs.nbytes
    assert not torch.equal(OBQ(bits=bits, grid="range", order=order)(weight, inputs + 0.2).dense(), theirs.dense())


def test_columns_without_input_are_zero_and_disturb_nothing(generator):
    """Oracle: the layer without these columns."""
    weight, inputs = layer(generator, dtype=torch.float64)
    dead, alive = [0, 5, 11], [1, 2, 3, 4, 6, 7, 8, 9, 10]
    inputs[:, dead] = 0
    dense = OBQ(bits=3, grid="range")(weight, inputs).dense()
    assert torch.equal(dense[:, alive], OBQ(bits=3, grid="range")(weight[:, alive], inputs[:, alive]).dense())
    assert (dense[:, dead] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    dense = OBQ(bits=4)(weight, inputs).dense()
    assert dense.dtype == dtype
    assert_close(dense, OBQ(bits=4)(weight.float(), inputs.float()).dense().to(dtype))


def test_float32_is_enough_on_a_layer_with_outlier_channels(generator):
    """Oracle: the same in float64, to which downdates in float32 could lose: diagonals differ by a factor of ten thousand here."""
    weight, inputs = substrate(generator)
    weight, inputs = weight[:8, :160].clone(), inputs[:, :160]
    exact = OBQ(bits=3)(weight.double(), inputs.double()).dense()
    assert error(weight, OBQ(bits=3)(weight, inputs).dense(), inputs) < 1.1 * error(
        weight.double(), exact, inputs.double()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"grid": "mse"}, "grid='mse' must be 'clipped' or 'range'"),
        ({"order": "random"}, "order='random' must be 'greedy' or 'given'"),
        ({"damping": -0.1}, "damping=-0.1 must be 0 or more"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        OBQ(**change)


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        (torch.ones(2, 3), None, "OBQ needs the layer's inputs"),
        (torch.ones(2, 3), torch.zeros(5, 3), "inputs are all zero"),
        (torch.full((1, 3), 1e8), torch.ones(5, 3), r"use scale_dtype=torch\.float32"),
    ],
)
def test_bad_layers_are_refused(weight, inputs, message):
    with pytest.raises(ValueError, match=message):
        OBQ(bits=2)(weight, inputs)


def small_substrate(generator):
    """A corner of the arena's layer, with some of its outlier channels."""
    weight, inputs = substrate(generator)
    energy = inputs.square().mean(dim=0).argsort(descending=True)
    columns = torch.cat([energy[:3], energy[60:185]]).sort().values
    return weight[:32, columns].clone(), inputs[:, columns].clone()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_claim_beats_rtn(bits, claim, generator):
    """Output error over that of round-to-nearest, with the same grids."""
    weight, inputs = small_substrate(generator)
    ours = error(weight, OBQ(bits=bits, grid="range")(weight, inputs).dense(), inputs)
    claim(
        "obq",
        f"beats-rtn-at-{bits}-bits",
        ours / error(weight, RTN(bits=bits, granularity="channel")(weight).dense(), inputs),
    )


def test_claim_beats_rtn_without_outlier_channels(claim, generator):
    """Output error over that of round-to-nearest, with the same grids, 3 bits, on correlated inputs of one size."""
    weight, inputs = layer(generator, 32, 64, 400)
    ours = error(weight, OBQ(bits=3, grid="range")(weight, inputs).dense(), inputs)
    rtn = error(weight, RTN(bits=3, granularity="channel")(weight).dense(), inputs)
    claim("obq", "beats-rtn-without-outlier-channels", ours / rtn)


def given_or_greedy(weight, inputs):
    """Output error of the greedy order over that of the given one, 3 bits."""
    greedy, given = (OBQ(bits=3, grid="range", order=order)(weight, inputs).dense() for order in ("greedy", "given"))
    return error(weight, greedy, inputs) / error(weight, given, inputs)


def test_claim_greedy_beats_given(claim, generator):
    """Output error of the greedy order over that of the given one, GPTQ's, 3 bits, on a layer with outlier channels."""
    claim("obq", "greedy-beats-given", given_or_greedy(*small_substrate(generator)))


def test_claim_greedy_beats_given_without_outlier_channels(claim, generator):
    """The same on correlated inputs of one size."""
    claim("obq", "greedy-beats-given-without-outlier-channels", given_or_greedy(*layer(generator, 32, 64, 400)))


class Patient(OBQ):
    """The greedy order alone."""

    def _choice(self, error, diagonal, scale, free):
        return (error.square() / diagonal).masked_fill(~free, torch.inf).argmin(dim=1)


@pytest.mark.parametrize("name", ["outliers-at-once", "outliers-at-once-with-outlier-channels"])
def test_claim_outliers_at_once(name, claim, generator):
    """Output error with weights beyond half a step rounded at once, over that of the greedy order alone; 3 bits, clipped grids, on
    correlated inputs of one size, or on some of the arena's layer."""
    weight, inputs = layer(generator, 32, 64, 400) if name == "outliers-at-once" else small_substrate(generator)
    claim(
        "obq",
        name,
        error(weight, OBQ(bits=3)(weight, inputs).dense(), inputs)
        / error(weight, Patient(bits=3)(weight, inputs).dense(), inputs),
    )
