"""FWSVD: gradients by hand and by another route, and the optimum of the weighted error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl import testbed
from refimpl.compression.low_rank.factored import project
from refimpl.compression.low_rank.fwsvd import FWSVD, fisher_information, weighted_basis
from refimpl.compression.low_rank.layers import linear_layers
from refimpl.compression.low_rank.svd import SVD
from refimpl.compression.protocol import CompressedLinear, compress
from refimpl.model.linear import weight_of
from refimpl.model.train import next_token_loss, perplexity
from tests.compression.conftest import decoder, gpt2, llama
from tests.compression.low_rank.test_svd_llm import texts


def test_information_by_hand():
    """Oracle: by hand. For logits Wx at x = e₀ the gradient of the loss is p − y in column 0 and 0 elsewhere."""
    model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(2 * torch.eye(3))
        model[1].weight.zero_()
    found = fisher_information(model, ["1"], [torch.tensor([[0, 1]])])["1"]
    assert_close(found, torch.tensor([4 * (1 / 9 + 4 / 9 + 1 / 9), 0.0, 0.0]))  # 2² ‖(1/3, −2/3, 1/3)‖²


def test_information_is_the_mean_square_over_texts(tokens):
    """Oracle: `backward` on each text, in float64, for layers with weights both ways round. Batches do not matter."""
    for build in (decoder, gpt2):
        model = build().double()
        layers = linear_layers(model)
        expected = dict.fromkeys(layers, 0.0)
        for row in tokens:
            model.zero_grad()
            logits = model(row[None])
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            F.cross_entropy(logits[0, :-1], row[1:]).backward()
            for name, layer in layers.items():
                gradient = layer.weight.grad.T if type(layer).__name__ == "Conv1D" else layer.weight.grad
                expected[name] = expected[name] + gradient.square().sum(0) / 3
        model.zero_grad()
        for batches in ([tokens], [tokens[:1], tokens[1:]]):
            found = fisher_information(model, list(layers), batches)
            for name in layers:
                assert_close(found[name], expected[name])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_padding_does_not_count(tokens):
    """Oracle: the texts without their padding; a row of nothing else is no text."""
    model, mask = llama().double(), torch.ones_like(tokens)
    mask[0, 6:], mask[1, :] = 0, 0
    names = list(linear_layers(model))
    found = fisher_information(model, names, [{"input_ids": tokens, "attention_mask": mask}])
    expected = fisher_information(model, names, [tokens[:1, :6], tokens[2:]])
    for name in names:
        assert_close(found[name], expected[name])
    assert not torch.allclose(found[names[0]], fisher_information(model, names, [tokens])[names[0]])


def objective(weight, dense, information):
    return ((dense - weight).square() * information).sum()


def test_no_other_factors_have_less_weighted_error(generator):
    """Oracle: brute force. Newton-free alternating least squares of the weighted problem from many starts, in float64."""
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    information = torch.rand(10, generator=generator, dtype=torch.float64) ** 3
    ours = objective(weight, project(weight, weighted_basis(weight, information), 2).dense(), information)
    found = []
    for _ in range(5):
        right = torch.randn(2, 10, generator=generator, dtype=torch.float64)
        for _ in range(500):  # each step is the exact optimum of one factor with the other fixed
            scaled = right * information
            left = weight @ scaled.T @ torch.linalg.inv(scaled @ right.T)
            right = torch.linalg.solve(left.T @ left, left.T @ weight)
        found.append(objective(weight, left @ right, information))
    assert_close(ours, min(found))
    assert objective(weight, SVD(rank=2)(weight).dense(), information) > 1.05 * ours  # negative control


def test_as_the_paper_writes_it(generator):
    """Oracle: Î⁻¹ U Σ Vᵀ of the paper's layout, [in, out], written out; weights enter as square roots."""
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    information = torch.rand(10, generator=generator, dtype=torch.float64) + 0.1
    root = torch.diag(information.sqrt())
    u, s, vh = torch.linalg.svd(root @ weight.T, full_matrices=False)
    expected = torch.linalg.inv(root) @ u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    assert_close(project(weight, weighted_basis(weight, information), 3).dense(), expected.T)


@pytest.mark.parametrize("information", [torch.full((10,), 0.25), torch.zeros(10), torch.full((10,), 1e-30)])
def test_equal_information_gives_the_svd(information, generator):
    """Oracle: the relation `generalizes`; none at all is equal information too, and so is hardly any."""
    weight = torch.randn(7, 10, generator=generator)
    basis = weighted_basis(weight, information)
    assert_close(project(weight, basis, 2).dense(), SVD(rank=2)(weight).dense())


def test_inputs_without_information_are_no_matter(generator):
    """Oracle: the SVD of the other columns. Those that the loss does not see are projected along."""
    weight = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    information = torch.ones(20, dtype=torch.float64)
    information[12:] = 0
    dense = project(weight, weighted_basis(weight, information), 3).dense()
    assert_close(dense[:, :12], SVD(rank=3)(weight[:, :12]).dense())
    assert torch.isfinite(dense).all() and dense[:, 12:].abs().max() > 0.1


def test_every_layer_is_factored(build, tokens):
    """Oracle: the definition, from the model's information, layer by layer."""
    model = build()
    layers = linear_layers(model)
    information = fisher_information(model, list(layers), [tokens])
    small = FWSVD(ratio=0.4)(model, [tokens])
    for name, layer in layers.items():
        weight, packed = weight_of(layer), small.get_submodule(name)
        assert isinstance(packed, CompressedLinear)
        rank = packed.compressed.left.shape[1]
        assert_close(packed.weight, project(weight, weighted_basis(weight, information[name]), rank).dense())
        assert rank * sum(weight.shape) <= 0.6 * weight.numel() < (rank + 1) * sum(weight.shape)


def test_fixed_rank_and_nothing_removed(tokens, logits):
    """Oracle: the model, for a ratio of 0, without data."""
    model = decoder()
    assert torch.equal(logits(FWSVD(ratio=0.0)(model), tokens), logits(model, tokens))
    small = FWSVD(rank=3)(model, [tokens])
    assert small.layers[0].feed_forward.up_proj.compressed.left.shape == (40, 3)


def test_half_precision_is_differentiated_in_float32(tokens):
    """Oracle: the float32 model of the same weights. Squares of small gradients would be zero in float16."""
    model = decoder().half()
    names = list(linear_layers(model))
    expected = fisher_information(copy.deepcopy(model).float(), names, [tokens])
    found = fisher_information(model, names, [tokens])
    assert all(torch.equal(found[name], expected[name]) for name in names)
    small = FWSVD(ratio=0.4)(model.bfloat16(), [tokens])
    assert small.layers[0].feed_forward.up_proj.compressed.left.dtype == torch.bfloat16


@torch.no_grad()
def test_gradients_are_taken_where_they_are_switched_off(tokens):
    """Oracle: the same call outside; also for a model whose parameters take no gradient."""
    with torch.enable_grad():
        expected = FWSVD()(decoder(), [tokens]).state_dict()
    found = FWSVD()(decoder().requires_grad_(False), [tokens]).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"), [({"ratio": -0.1}, "ratio=-0.1"), ({"rank": 0}, "rank=0 must be at least 1")]
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        FWSVD(**change)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((), "needs texts .*: pass `calibration`"),
        (torch.ones(1, 2), "must be a list of batches"),
        ([torch.ones(1, 2, 32)], "calibration batch 0 must hold tokens"),
        ([torch.tensor([[61, 1]])], "can't take calibration batch 0"),
        ([torch.tensor([[1]])], "no token with one before it"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        FWSVD()(decoder(), calibration)


def test_layers_that_the_loss_does_not_see_are_refused(tokens):
    model = decoder()
    model.idle = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="does not depend on layer 'idle'"):
        FWSVD()(model, [tokens])


def test_claim_beats_svd(claim, trained):
    """Perplexity of held-out text over that of plain SVD at the same ranks, the worst of ratios 0.2, 0.4 and 0.6."""
    model, calibration, held_out = trained
    worst = 0.0
    for ratio in (0.2, 0.4, 0.6):
        plain = perplexity(compress(model, SVD(ratio=ratio)), held_out, 32)
        worst = max(worst, perplexity(FWSVD(ratio=ratio)(model, calibration), held_out, 32) / plain)
    claim("fwsvd", "beats-svd", worst)


def test_claim_beats_svd_when_much_is_removed(claim, generator):
    """Perplexity of held-out text over that of plain SVD at the same ranks; the testbed's model, which is below it at 20 percent."""
    subject = testbed.subject(None, "cpu")
    calibration, held_out = texts(subject, generator)
    over = {}
    for ratio in (0.2, 0.6):
        ours, plain = FWSVD(ratio=ratio)(subject.model, calibration), compress(subject.model, SVD(ratio=ratio))
        over[ratio] = perplexity(ours, held_out, 256) / perplexity(plain, held_out, 256)
    assert over[0.2] < 1
    claim("fwsvd", "beats-svd-when-much-is-removed", over[0.6])


def test_claim_larger_weight_error(claim, trained):
    """Squared error of all weights over that of the SVD, ratio 0.4, where the training loss is lower."""
    model, calibration, _ = trained
    ours, plain = FWSVD(ratio=0.4)(model, calibration), compress(model, SVD(ratio=0.4))
    errors = [
        sum(
            float((small.get_submodule(n).weight - w.weight).detach().square().sum())
            for n, w in linear_layers(model).items()
        )
        for small in (ours, plain)
    ]
    losses = [float(next_token_loss(small, calibration[0]).detach()) for small in (ours, plain)]
    claim("fwsvd", "larger-weight-error", errors[0] / errors[1] if losses[0] < losses[1] else 0.0)
