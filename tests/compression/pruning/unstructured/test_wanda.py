"""Wanda: held by the authors' procedure written out, by what each weight contributes to the output, and by trying all masks."""

import itertools
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.arena.weights import substrate
from refimpl.compression.protocol import apply
from refimpl.compression.pruning.sparse import SparseWeight, lowest
from refimpl.compression.pruning.structured.shortgpt import ShortGPT
from refimpl.compression.pruning.unstructured.magnitude import Magnitude
from refimpl.compression.pruning.unstructured.n_m_sparsity import NMSparsity
from refimpl.compression.pruning.unstructured.sparsegpt import SparseGPT
from refimpl.compression.pruning.unstructured.wanda import Wanda, wanda_scores
from refimpl.model.train import perplexity


def layer(generator, out=5, columns=12, rows=40):
    """A weight, and inputs whose features differ in size."""
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(out, columns, generator=generator), torch.randn(rows, columns, generator=generator) * sizes


def error(weight, dense, inputs):
    return float((inputs @ (dense.float() - weight).T).norm() / (inputs @ weight.T).norm())


def plain(weight, inputs, sparsity=0.5, pattern=None):
    """The authors' procedure, plainly: a running mean of squared norms, and a sort of every row or of every group in turn."""
    squares = torch.zeros(weight.shape[1])
    for seen, text in enumerate(inputs.split(512)):
        squares *= seen / (seen + 1)
        squares += text.T.float().norm(p=2, dim=1) ** 2 / (seen + 1)
    metric = weight.abs() * squares.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if pattern:
        for start in range(0, weight.shape[1], pattern[1]):
            group = metric[:, start : start + pattern[1]]
            places = group.sort(dim=1, stable=True).indices[:, : group.shape[1] - pattern[0]]
            mask.scatter_(1, start + places, True)
    else:
        places = metric.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
        mask.scatter_(1, places, True)
    return weight.masked_fill(mask, 0)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6, "2:4", "4:8"])
def test_equals_the_authors_procedure(sparsity, generator):
    """Oracle: their procedure, over three texts of different lengths."""
    weight, inputs = layer(generator, 33, 40, 1100)
    pattern = tuple(map(int, sparsity.split(":"))) if isinstance(sparsity, str) else None
    expected = plain(weight, inputs, sparsity, pattern)
    assert torch.equal(Wanda(sparsity=sparsity)(weight, inputs).dense(), expected)
    magnitude = NMSparsity(pattern=sparsity) if pattern else Magnitude(sparsity=sparsity, compare="row")
    assert not torch.equal(magnitude(weight).dense(), expected)  # negative control: inputs count


def test_a_weights_score_is_what_its_removal_costs(generator):
    """Oracle: the output itself, with one weight at a time removed, in float64."""
    weight, inputs = (tensor.double() for tensor in layer(generator, 3, 7))
    scores = wanda_scores(weight, inputs)
    assert scores.dtype == torch.float64
    for i, j in itertools.product(range(3), range(7)):
        without = weight.clone()
        without[i, j] = 0
        assert_close(scores[i, j] ** 2, (inputs @ (without - weight).T).square().sum())


def test_of_all_masks_of_a_row_it_costs_least_where_inputs_do_not_mix(generator):
    """Oracle: brute force over all masks of each row, with inputs that are orthogonal, so that costs add up."""
    weight, inputs = torch.randn(3, 8, generator=generator), torch.diag(torch.rand(8, generator=generator) + 0.1)
    dense = Wanda(sparsity=0.5)(weight, inputs).dense()
    for row, pruned in zip(weight, dense, strict=True):
        costs = [
            float((inputs[:, list(gone)] @ row[list(gone)]).norm()) for gone in itertools.combinations(range(8), 4)
        ]
        assert float((inputs @ (pruned - row)).norm()) == pytest.approx(min(costs))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.999])
def test_every_row_loses_the_same(sparsity, generator):
    """Oracle: arithmetic. A row of small weights keeps as many as the others."""
    weight, inputs = layer(generator, 6, 21)
    weight[2] /= 1000
    dense = Wanda(sparsity=sparsity)(weight, inputs).dense()
    assert (dense == 0).sum(dim=1).tolist() == [int(21 * sparsity)] * 6
    assert torch.equal(dense[dense != 0], weight[dense != 0])


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_inputs_of_equal_norm_give_magnitude(sparsity, generator):
    """Oracle: closed form. Signs do not change a norm; Wanda contains magnitude pruning by row, and by pattern N:M."""
    weight = torch.randn(6, 20, generator=generator)
    inputs = torch.randint(0, 2, (16, 20), generator=generator) * 2.0 - 1
    expected = Magnitude(sparsity=sparsity, compare="row")(weight).dense()
    assert torch.equal(Wanda(sparsity=sparsity)(weight, inputs).dense(), expected)
    pattern = Wanda(sparsity="2:4")(weight, inputs)
    assert torch.equal(pattern.dense(), NMSparsity()(weight).dense())
    assert pattern.nbytes == NMSparsity()(weight).nbytes
    inputs[:, 3] *= 1e3
    assert not torch.equal(Wanda(sparsity=sparsity)(weight, inputs).dense(), expected)  # negative control


def test_worked_by_hand():
    """Oracle: by hand. Norms 5, 1 and 10; scores 5, 4, 3 in the first row and 10, 6, 20 in the second."""
    weight, inputs = (
        torch.tensor([[1.0, -4.0, 0.3], [2.0, 6.0, -2.0]]),
        torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 10.0]]),
    )
    assert_close(wanda_scores(weight, inputs), torch.tensor([[5.0, 4.0, 3.0], [10.0, 6.0, 20.0]]))
    assert_close(Wanda(sparsity=0.4)(weight, inputs).dense(), torch.tensor([[1.0, -4.0, 0.0], [2.0, 0.0, -2.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result on the same numbers, cast."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    dense = Wanda()(weight, inputs).dense()
    assert torch.equal(dense, Wanda()(weight.float(), inputs.float()).dense().to(dtype))


def test_half_precision_inputs_do_not_overflow():
    """Oracle: by hand. Norms of 120000 and 100000 are beyond float16, and the first input is larger."""
    inputs = torch.tensor([[60000.0, 50000.0]], dtype=torch.float16).repeat(4, 1)
    dense = Wanda()(torch.ones(1, 2, dtype=torch.float16), inputs).dense()
    assert dense.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("rows", [1, 2])
def test_few_inputs(rows, generator):
    """Oracle: their procedure."""
    weight, inputs = layer(generator, rows=rows)
    assert torch.equal(Wanda()(weight, inputs).dense(), plain(weight, inputs))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, "4:2", "half"])
def test_configuration_is_checked(sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity!r} must be"):
        Wanda(sparsity=sparsity)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "needs the layer's inputs: pass `inputs`, or `calibration`"),
        (torch.zeros(5, 3), "inputs are all zero"),
        (torch.ones(5, 4), r"inputs of shape \(5, 4\) must be \[n, in\]"),
    ],
)
def test_bad_layers_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        Wanda()(torch.ones(2, 3), inputs)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_beside_the_authors_procedure(sparsity, peer, measured_layer, generator):
    """Oracle: their procedure in plain PyTorch; there is no package of it. Of two weights that count nearly the same either may go,
    and so the output's errors are compared; smaller layers are held to equal weights above."""
    weight, inputs = layer(generator, *measured_layer)
    pattern = (2, 4) if sparsity == "2:4" else None
    peer(
        "wanda",
        "their procedure, written out in torch",
        f"prune {measured_layer[0]} by {measured_layer[1]} with {measured_layer[2]} inputs, {sparsity}: relative output error; ours packs what is left",
        lambda: torch.tensor(error(weight, Wanda(sparsity=sparsity)(weight, inputs).dense(), inputs)),
        lambda: torch.tensor(error(weight, plain(weight, inputs, 0.5, pattern), inputs)),
        within=1e-5,
    )


def test_claim_beats_magnitude(claim, generator):
    """Output error over that of magnitude pruning, both without half of the weights, on a layer with outlier features."""
    weight, inputs = substrate(generator)
    ours, theirs = Wanda()(weight, inputs).dense(), Magnitude()(weight).dense()
    claim("wanda", "beats-magnitude", error(weight, ours, inputs) / error(weight, theirs, inputs))


def over_the_layer(weight, inputs):
    """Wanda's scores, compared over the whole layer."""
    scores = wanda_scores(weight, inputs)
    return SparseWeight(weight, ~lowest(scores.flatten(), scores.numel() // 2).view(scores.shape))


@pytest.fixture(scope="module")
def left():
    """Perplexity on held-out text that a method leaves the testbed's model with, calibrated on training text; measured once."""
    subject = testbed.subject(None, "cpu")
    calibration = [*subject.text("train", 8 * 256).view(2, 4, 256)]
    held_out = subject.text("held-out", 8 * 256)
    return cache(lambda method: perplexity(apply(method, subject.model, calibration), held_out, 256))


def test_claim_beats_magnitude_in_perplexity(claim, left):
    """Perplexity over that of magnitude pruning, both without half of the weights, on the testbed's model."""
    claim("wanda", "beats-magnitude-in-perplexity", left(Wanda()) / left(Magnitude()))


def test_claim_scores_beat_size(claim, left):
    """Perplexity with Wanda's scores compared in each layer, over that of magnitude pruning; half removed, testbed."""
    claim("wanda", "scores-beat-size", left(over_the_layer) / left(Magnitude()))


def test_claim_rows_beat_layers(claim, left):
    """Perplexity with weights compared in each row, over that with weights compared in each layer; half removed, testbed."""
    claim("wanda", "rows-beat-layers", left(Wanda()) / left(over_the_layer))


def test_claim_near_sparsegpt(claim, left):
    """Perplexity over that of SparseGPT, both without half of the weights, on the testbed's model."""
    claim("wanda", "near-sparsegpt", left(Wanda()) / left(SparseGPT()))


def test_claim_single_weights_beat_blocks(claim, left):
    """Perplexity without a third of the weights over that without a third of the blocks, two of six, on the testbed's model."""
    claim("wanda", "single-weights-beat-blocks", left(Wanda(sparsity=1 / 3)) / left(ShortGPT(sparsity=1 / 3)))
