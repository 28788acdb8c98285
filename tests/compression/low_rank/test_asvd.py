"""ASVD: scaling by hand, and the search that gives each layer its rank."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.low_rank.asvd import ASVD, mean_absolute_inputs, scaled_basis
from refimpl.compression.low_rank.factored import project, rank_for
from refimpl.compression.low_rank.layers import linear_layers, replace_weight
from refimpl.compression.low_rank.rank_search import perplexities
from refimpl.compression.low_rank.svd import SVD
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.text_loss import loss_of
from refimpl.model.linear import weight_of
from refimpl.model.train import perplexity
from tests.compression.conftest import decoder


def test_sizes_are_means_over_all_tokens(build, tokens):
    """Oracle: what reaches each layer, caught by hooks and averaged at once; batches of different sizes."""
    model, caught = build(), {}
    layers = linear_layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: caught.setdefault(name, []).append(args[0]))
    found = mean_absolute_inputs(model, layers, [tokens, tokens[:1, :4]])
    for name in layers:
        rows = torch.cat([inputs.detach().flatten(0, -2) for inputs in caught[name]])
        assert_close(found[name], rows.double().abs().mean(0))
        assert len(layers[name]._forward_pre_hooks) == 1


def test_as_the_paper_writes_it(generator):
    """Oracle: U Σ Vᵀ S⁻¹ with S = diag(mean |X|)^α, written out in float64."""
    weight = torch.randn(9, 14, generator=generator, dtype=torch.float64)
    size = torch.rand(14, generator=generator, dtype=torch.float64) + 0.1
    for alpha in (0.5, 1.0, 0.3):
        scale = torch.diag(size**alpha)
        u, s, vh = torch.linalg.svd(weight @ scale, full_matrices=False)
        expected = u[:, :3] @ torch.diag(s[:3]) @ vh[:3] @ torch.linalg.inv(scale)
        assert_close(project(weight, scaled_basis(weight, size, alpha), 3).dense(), expected)
    plain = SVD(rank=3)(weight).dense()
    assert_close(project(weight, scaled_basis(weight, size, 0.0), 3).dense(), plain)  # the relation `generalizes`
    assert not torch.allclose(project(weight, scaled_basis(weight, size), 3).dense(), plain)


def test_inputs_that_are_always_zero(generator):
    """Oracle: the SVD of the other columns, without a division by zero."""
    weight, size = torch.randn(9, 14, generator=generator), torch.ones(14)
    size[10:] = 0
    dense = project(weight, scaled_basis(weight, size), 2).dense()
    assert_close(dense[:, :10], SVD(rank=2)(weight[:, :10]).dense())
    assert torch.isfinite(dense).all()


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_target_is_reached_and_not_by_far(build, ratio, tokens):
    """Oracle: counting. The largest step of the search is one layer's."""
    model = build()
    layers = linear_layers(model)
    small = ASVD(ratio=ratio)(model, [tokens])
    total = sum(layer.weight.numel() for layer in layers.values())
    held = 0
    for name, layer in layers.items():
        there = small.get_submodule(name)
        held += (
            sum(b.numel() for b in there.compressed.buffers())
            if isinstance(there, CompressedLinear)
            else layer.weight.numel()
        )
    largest = max(layer.weight.numel() for layer in layers.values())
    assert ratio <= 1 - held / total < ratio + largest / total


def test_layers_are_projected_by_the_configured_exponent(tokens):
    """Oracle: the definition, from the model's inputs, at the rank that the search gave. Control: the default is another."""
    model = decoder()
    small, layers = ASVD(ratio=0.4, alpha=1.0)(model, [tokens]), linear_layers(model)
    sizes = mean_absolute_inputs(model, layers, [tokens])
    factored = {name: there for name in layers if isinstance(there := small.get_submodule(name), CompressedLinear)}
    for name, there in factored.items():
        weight, rank = weight_of(layers[name]), there.compressed.left.shape[1]
        assert_close(there.weight, project(weight, scaled_basis(weight, sizes[name], 1.0), rank).dense())
        assert not torch.allclose(there.weight, project(weight, scaled_basis(weight, sizes[name]), rank).dense())
    assert len(factored) > 3


def test_only_the_first_samples_are_read(tokens, monkeypatch):
    """Oracle: the call with these texts alone; inputs are averaged over all."""
    seen = []
    real = perplexities
    monkeypatch.setattr(
        "refimpl.compression.low_rank.asvd.perplexities", lambda *args: seen.append(args[-1]) or real(*args)
    )
    ASVD(ratio=0.2, samples=4)(decoder(), [tokens, tokens.flip(0), tokens])
    assert [part.tolist() for part in seen[0]] == [tokens.tolist(), tokens.flip(0)[:1].tolist()]


def test_nothing_removed_is_the_identity(tokens, logits):
    """Oracle: the model; data is not asked for."""
    model = decoder()
    assert torch.equal(logits(ASVD(ratio=0.0)(model), tokens), logits(model, tokens))


def test_layers_too_small_to_factor_stay(generator):
    """Oracle: arithmetic. Factors of a column hold more than it does."""
    model = nn.Sequential(nn.Embedding(9, 1), nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 9))
    small = ASVD(ratio=0.2)(model, [torch.randint(0, 9, (2, 7), generator=generator)])
    assert isinstance(small[1], nn.Linear) and isinstance(small[3], CompressedLinear)


def test_half_precision(tokens):
    """Oracle: the dtype of the model; the ranks it gets are those of a model that still runs."""
    small = ASVD(ratio=0.3)(decoder().bfloat16(), [tokens])
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.bfloat16}
    assert torch.isfinite(small(tokens)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.95}, "ratio=0.95 must be 0 to 0.9, what the smallest candidate removes"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"alpha": -1.0}, r"alpha=-1.0 must be 0 \(plain SVD\) or more"),
        ({"candidates": (0.5, 1.0)}, "candidates=.* above 0 and below 1"),
        ({"candidates": ()}, "candidates="),
        ({"samples": 0}, "samples=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ASVD(**change)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((), "needs texts .*: pass `calibration`"),
        (torch.ones(1, 2), "must be a list of batches"),
        ([torch.tensor([[61, 1]])], "can't take calibration batch 0"),
        ([torch.tensor([[1]])], "no token with one before it"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        ASVD()(decoder(), calibration)


def test_layers_that_are_not_reached_are_refused(tokens):
    model = decoder()
    model.idle = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="never reaches layer 'idle'"):
        ASVD()(model, [tokens])


# Claims


def errors_of_output(generator, alphas, ratios):
    """Output error on new inputs by alpha and ratio, on the arena's synthetic layer with outlier channels."""
    weight, inputs = substrate(generator)
    seen, new = inputs[:768], inputs[768:]
    found = {}
    for alpha in alphas:
        basis = scaled_basis(weight, seen.abs().mean(0), alpha)
        for ratio in ratios:
            dense = project(weight, basis, rank_for(*weight.shape, ratio)).dense()
            found[alpha, ratio] = float((new @ (dense - weight).T).norm() / (new @ weight.T).norm())
    return found


def test_claim_beats_svd(claim, generator):
    """Output error on new inputs over that of plain SVD at the same rank, the worst of ratios 0.2, 0.4 and 0.6."""
    ratios = (0.2, 0.4, 0.6)
    found = errors_of_output(generator, (0.0, 0.5), ratios)
    claim("asvd", "beats-svd", max(found[0.5, ratio] / found[0.0, ratio] for ratio in ratios))


def test_claim_half_is_the_best_power(claim, generator):
    """Output error at alpha 0.5 over the least of those at 0.1, 0.25, 1 and 2, ratio 0.2."""
    found = errors_of_output(generator, (0.1, 0.25, 0.5, 1.0, 2.0), (0.2,))
    claim("asvd", "half-is-the-best-power", found[0.5, 0.2] / min(found[a, 0.2] for a in (0.1, 0.25, 1.0, 2.0)))


def test_claim_search_beats_one_ratio(claim, trained):
    """Perplexity of held-out text over that with one ratio for all layers, the worst of ratios 0.2, 0.4 and 0.6."""
    model, calibration, held_out = trained
    layers = linear_layers(model)
    sizes = mean_absolute_inputs(model, layers, calibration)
    worst = 0.0
    for ratio in (0.2, 0.4, 0.6):
        searched = ASVD(ratio=ratio)(model, calibration)
        alike = ASVD(ratio=0.0)(model)
        for name, layer in layers.items():
            weight = weight_of(layer)
            basis = scaled_basis(weight, sizes[name])
            replace_weight(alike, name, project(weight, basis, rank_for(*weight.shape, ratio)))
        worst = max(worst, perplexity(searched, held_out, 32) / perplexity(alike, held_out, 32))
    claim("asvd", "search-beats-one-ratio", worst)


def test_claim_kinds_of_layers_differ(claim, trained):
    """Largest over smallest rise of the loss when one layer alone keeps 0.3 of its parameters."""
    model, calibration, _ = trained
    layers = linear_layers(model)
    sizes = mean_absolute_inputs(model, layers, calibration)
    base = float(loss_of(model, calibration[0]).mean().detach())
    rises = []
    for name, layer in layers.items():
        weight = weight_of(layer)
        value = perplexities(
            model, name, scaled_basis(weight, sizes[name]), [rank_for(*weight.shape, 0.7)], calibration
        )
        rises.append(torch.tensor(value[0]).log().item() - base)
    assert len(rises) == 14 and min(rises) > 0
    claim("asvd", "layers-differ", max(rises) / min(rises))


def test_candidates_are_those_of_the_paper():
    """Oracle: the paper's list of ratios; pairs differ by a tenth."""
    pairs = itertools.pairwise(ASVD().candidates)
    assert ASVD().candidates[0] == 0.1 and all(round(b - a, 6) == 0.1 for a, b in pairs) and len(ASVD().candidates) == 9
