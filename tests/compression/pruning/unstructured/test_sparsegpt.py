"""SparseGPT: held by Optimal Brain Surgeon with inverses written out, by least squares, and by the authors' procedure."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.hessian import Sweep, gram, inverse_factor
from refimpl.compression.pruning.sparse import lowest, pattern_of
from refimpl.compression.pruning.unstructured.magnitude import Magnitude
from refimpl.compression.pruning.unstructured.n_m_sparsity import NMSparsity
from refimpl.compression.pruning.unstructured.sparsegpt import SparseGPT


def layer(generator, out=5, columns=12, rows=40, dtype=torch.float64):
    """A weight and correlated inputs."""
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 3
    inputs = torch.randn(rows, columns, generator=generator) @ mixing
    return torch.randn(out, columns, generator=generator).to(dtype), inputs.to(dtype)


def error(weight, dense, inputs):
    return float((inputs @ (dense.to(weight.dtype) - weight).T).norm() / (inputs @ weight.T).norm())


def damped(inputs, damping=0.01):
    hessian = inputs.double().T @ inputs.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def surgeon(weight, inputs, sparsity, size):
    """Optimal Brain Surgeon in a fixed order, in float64: the inverse over all columns that are free is computed anew for each
    column, and the mask of a block when its first column is reached."""
    hessian, w = damped(inputs), weight.double().clone()
    rows, columns = w.shape
    gone = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j % size == 0:
            block = range(j, min(j + size, columns))
            costs = torch.stack([w[:, c] ** 2 / torch.linalg.inv(hessian[c:, c:])[0, 0] for c in block], dim=1)
            if isinstance(sparsity, str):
                count = max(0, len(block) - pattern_of(sparsity).kept)
                gone[:, j : j + size].scatter_(1, costs.argsort(dim=1, stable=True)[:, :count], True)
            else:
                places = costs.flatten().argsort(stable=True)[: int(costs.numel() * sparsity)]
                gone[places // len(block), j + places % len(block)] = True
        inverse = torch.linalg.inv(hessian[j:, j:])
        w[:, j:] -= (w[:, j] * gone[:, j])[:, None] / inverse[0, 0] * inverse[0]
        w[gone[:, j], j] = 0.0  # what is left is rounding
    return w


@pytest.mark.parametrize("size", [1, 4, 5, 12])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6])
def test_equals_optimal_brain_surgeon_in_a_fixed_order(sparsity, size, generator):
    """Oracle: OBS with an inverse for every column, in float64; 5 does not divide 12."""
    weight, inputs = layer(generator)
    dense = SparseGPT(sparsity=sparsity, mask_block=size)(weight, inputs).dense()
    assert_close(dense, surgeon(weight, inputs, sparsity, size))
    assert not torch.allclose(dense[dense != 0], weight[dense != 0])  # negative control: what stays has moved


@pytest.mark.parametrize("columns", [12, 15, 9])
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "1:3"])
def test_patterns_equal_optimal_brain_surgeon(sparsity, columns, generator):
    """Oracle: as above, with a mask for each row and group; where M does not divide the columns, the last group is shorter."""
    weight, inputs = layer(generator, columns=columns)
    pruned = SparseGPT(sparsity=sparsity)(weight, inputs)
    n, m = pattern_of(sparsity)
    assert_close(pruned.dense(), surgeon(weight, inputs, sparsity, m))
    for start in range(0, columns, m):
        group = pruned.dense()[:, start : start + m]
        assert ((group != 0).sum(dim=1) == min(n, group.shape[1])).all()


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_every_column_is_what_least_squares_would_have_there(sparsity, generator):
    """Oracle: least squares. Given what became of the columns before, what stays is the optimum over all that are free."""
    weight, inputs = layer(generator)
    dense, hessian = SparseGPT(sparsity=sparsity)(weight, inputs).dense(), damped(inputs)
    for j in range(12):
        moved = dense[:, :j] - weight[:, :j]
        free = weight[:, j:] - torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ moved.T).T
        kept = dense[:, j] != 0
        assert_close(dense[kept, j], free[kept, 0])


def test_the_last_block_of_one_row_is_regression(generator):
    """Oracle: regression. With the first columns removed and the rest kept, no other weights give a smaller damped error."""
    weight, inputs = layer(generator, out=1)
    weight[0, :6] *= 1e-3  # these go, and they are first: what stays is all refitted
    dense = SparseGPT(mask_block=12)(weight, inputs).dense()[0]
    assert (dense[:6] == 0).all()
    hessian = damped(inputs)
    assert_close(dense[6:], torch.linalg.solve(hessian[6:, 6:], hessian[6:] @ weight[0]))


def plain(weight, inputs, sparsity=0.5, pattern=None, block=128):
    """The authors' procedure, plainly: every column updates the rest of its block at once, row by row in memory."""
    w = weight.clone()
    hessian = 2 / len(inputs) * inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        here, part, errors = w[:, start:end].clone(), upper[start:end, start:end], torch.zeros_like(w[:, start:end])
        mask = torch.zeros_like(here, dtype=torch.bool)
        if not pattern:
            cost = (here**2 / part.diagonal() ** 2).flatten()
            mask = (cost < cost.sort().values[int(cost.numel() * sparsity)]).view(here.shape)
        for i in range(end - start):
            if pattern and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                cost = here[:, group] ** 2 / part.diagonal()[group] ** 2
                mask.scatter_(1, i + cost.topk(pattern[1] - pattern[0], dim=1, largest=False).indices, True)
            off = here[:, i].masked_fill(~mask[:, i], 0) / part[i, i]
            here[:, i:] -= off[:, None] @ part[None, i, i:]
            errors[:, i] = off
        w[:, start:end] = here.masked_fill(mask, 0)
        w[:, end:] -= errors @ upper[start:end, end:]
    return w


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6, "2:4", "4:8"])
def test_equals_the_authors_procedure(sparsity, generator):
    """Oracle: their procedure in float64, over three blocks, the last one shorter."""
    weight, inputs = layer(generator, 8, 304, 600)
    pattern = pattern_of(sparsity)
    assert_close(SparseGPT(sparsity=sparsity)(weight, inputs).dense(), plain(weight, inputs, sparsity, pattern))


@pytest.mark.parametrize("size", [16, 50, 300])
def test_lazy_blocks_change_nothing(size, generator):
    """Oracle: the same sweep with blocks of one column; masks are chosen inside blocks of updates, and across their ends."""
    weight, inputs = layer(generator, 8, 300, 600)
    factor = inverse_factor(gram(inputs, torch.float64), torch.zeros(300, dtype=torch.bool), 0.01)
    lazy, eager = weight.T.clone(), weight.T.clone()
    removed = [SparseGPT(mask_block=size)._prune_(w, factor, block) for w, block in ((lazy, 128), (eager, 1))]
    assert torch.equal(*removed)
    assert_close(lazy, eager)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_inputs_that_do_not_mix_give_magnitude(sparsity, generator):
    """Oracle: closed form. H is a multiple of the identity: nothing is passed on, and the size alone decides; its relations."""
    weight, inputs = torch.randn(6, 20, generator=generator), 3 * torch.eye(20)
    method = SparseGPT(sparsity=sparsity, mask_block=20)
    assert torch.equal(method(weight, inputs).dense(), Magnitude(sparsity=sparsity)(weight).dense())
    assert torch.equal(SparseGPT(sparsity="2:4")(weight, inputs).dense(), NMSparsity()(weight).dense())
    assert not torch.equal(method(weight, inputs + 1).dense(), Magnitude(sparsity=sparsity)(weight).dense())  # control


def test_worked_by_hand():
    """Oracle: by hand. Two inputs are equal but for a tenth: H = [[1, 1], [1, 1.1]], whose inverse is [[11, -10], [-10, 10]]. The
    first weight costs 1 / 11, the second 4 / (1 / 1.1): the first goes, and 1 × 10 / 11 is added to the second."""
    weight, inputs = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.1**0.5]])
    assert_close(SparseGPT(damping=0.0)(weight, inputs).dense(), torch.tensor([[0.0, 2 + 10 / 11]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6, 0.999])
def test_each_block_loses_exactly_its_share(sparsity, generator):
    """Oracle: arithmetic, rounded down; without any loss the weight is what it was."""
    weight, inputs = layer(generator, 7, 30, 60)
    dense = SparseGPT(sparsity=sparsity, mask_block=8)(weight, inputs).dense()
    blocks = [(int((part == 0).sum()), part.numel()) for part in dense.split(8, dim=1)]
    assert [gone for gone, _ in blocks] == [int(size * sparsity) for _, size in blocks]
    assert torch.equal(dense, weight) == (sparsity == 0)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_columns_without_input_are_zero(sparsity, generator):
    """Oracle: by hand. They cost nothing, so they go first, and pass nothing on."""
    weight, inputs = layer(generator, columns=8)
    dead, alive = [0, 3, 5, 6], [1, 2, 4, 7]
    inputs[:, dead] = 0
    dense = SparseGPT(sparsity=sparsity)(weight, inputs).dense()
    assert (dense[:, dead] == 0).all()
    if sparsity == 0.5:
        assert torch.equal(dense[:, alive], weight[:, alive])
    assert torch.equal(dense, SparseGPT(sparsity=sparsity)(weight, 1024 * inputs).dense())  # no unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight, inputs = layer(generator, dtype=dtype)
    dense = SparseGPT()(weight, inputs).dense()
    assert dense.dtype == dtype
    assert_close(dense, SparseGPT()(weight.float(), inputs.float()).dense().to(dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_columns(rows, generator):
    """Oracle: magnitude pruning. Damping makes the Hessian invertible; the inputs' few directions are kept better."""
    weight, inputs = layer(generator, rows=rows)
    off = [error(weight, dense, inputs) for dense in (SparseGPT()(weight, inputs).dense(), Magnitude()(weight).dense())]
    assert off[0] < off[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0 must be 0"),
        ({"sparsity": "4:2"}, "sparsity='4:2' must be 'N:M'"),
        ({"mask_block": 0}, "mask_block=0 must be at least 1; the paper uses 128"),
        ({"damping": -0.1}, "damping=-0.1 must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(**change)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "SparseGPT needs the layer's inputs: pass `inputs`, or `calibration`"),
        (torch.zeros(5, 3), "inputs are all zero"),
        (torch.ones(5, 4), r"inputs of shape \(5, 4\) must be \[n, in\]"),
    ],
)
def test_bad_layers_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT()(torch.ones(2, 3), inputs)


def test_a_singular_hessian_is_refused():
    with pytest.raises(ValueError, match="damping=0 leaves the Hessian of these inputs singular"):
        SparseGPT(damping=0)(torch.ones(2, 3), torch.ones(1, 3))


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_beside_the_authors_procedure(sparsity, peer, measured_layer, generator):
    """Oracle: their procedure in plain PyTorch; there is no package of it. In float32 a weight whose cost is nearly that of the
    next may fall either way, and so the output's errors are compared."""
    weight, inputs = layer(generator, *measured_layer, torch.float32)
    pattern = pattern_of(sparsity)
    peer(
        "sparsegpt",
        "their procedure, written out in torch",
        f"prune {measured_layer[0]} by {measured_layer[1]} with {measured_layer[2]} inputs, {sparsity}: relative output error; ours packs what is left",
        lambda: torch.tensor(error(weight, SparseGPT(sparsity=sparsity)(weight, inputs).dense(), inputs)),
        lambda: torch.tensor(error(weight, plain(weight, inputs, 0.5, pattern), inputs)),
        within=1e-4,
    )


def test_claim_beats_magnitude(claim, generator):
    """Output error over that of magnitude pruning, both without half of the weights, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours, theirs = SparseGPT()(weight, inputs).dense(), Magnitude()(weight).dense()
    claim("sparsegpt", "beats-magnitude", error(weight, ours, inputs) / error(weight, theirs, inputs))


def test_claim_free_beats_patterns(claim, generator):
    """Output error of 2:4 over that of zeros anywhere, half of the weights removed, on the arena's layer."""
    weight, inputs = substrate(generator)
    pattern, free = (SparseGPT(sparsity=sparsity)(weight, inputs).dense() for sparsity in ("2:4", 0.5))
    claim("sparsegpt", "free-beats-patterns", error(weight, pattern, inputs) / error(weight, free, inputs))


def test_claim_wider_groups_lose_less(claim, generator):
    """Output error of 4:8 over that of 2:4, on the arena's layer."""
    weight, inputs = substrate(generator)
    wide, narrow = (SparseGPT(sparsity=sparsity)(weight, inputs).dense() for sparsity in ("4:8", "2:4"))
    claim("sparsegpt", "wider-groups-lose-less", error(weight, wide, inputs) / error(weight, narrow, inputs))


def test_claim_columns_are_too_narrow(claim, generator):
    """Output error with the same share of each column removed over that with blocks of 128, on the arena's layer."""
    weight, inputs = substrate(generator)
    column, block = (SparseGPT(mask_block=size)(weight, inputs).dense() for size in (1, 128))
    claim("sparsegpt", "columns-are-too-narrow", error(weight, column, inputs) / error(weight, block, inputs))


def test_claim_adaptive_mask(claim, generator):
    """Output error with masks chosen block by block over that with the mask chosen before the sweep, on the arena's layer."""
    weight, inputs = substrate(generator)
    adaptive, once = (SparseGPT(mask_block=size)(weight, inputs).dense() for size in (128, weight.shape[1]))
    claim("sparsegpt", "adaptive-mask", error(weight, adaptive, inputs) / error(weight, once, inputs))


def test_claim_adaptive_mask_in_equal_blocks(claim, generator):
    """Output error with masks from corrected weights over that with masks of the same blocks, and of as many weights in each,
    from the weights before the sweep; the sweep is the same, on the arena's layer."""
    weight, inputs = substrate(generator)
    factor = inverse_factor(gram(inputs), torch.zeros(weight.shape[1], dtype=torch.bool), 0.01)
    blocks = (weight / factor.diagonal()).square().split(128, dim=1)
    removed = torch.cat([lowest(cost.flatten(), cost.numel() // 2).view(cost.shape) for cost in blocks], dim=1)
    columns = weight.T.clone()
    for i, sweep in enumerate(Sweep(columns, factor)):
        sweep.settle(sweep.column.masked_fill(removed[:, i], 0))
    adaptive = SparseGPT()(weight, inputs).dense()
    claim(
        "sparsegpt", "adaptive-mask-in-equal-blocks", error(weight, adaptive, inputs) / error(weight, columns.T, inputs)
    )
