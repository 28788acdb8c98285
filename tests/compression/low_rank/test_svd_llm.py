"""SVD-LLM: its theorem, the optimum by another route, singular Gram matrices, and the update."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl import testbed
from refimpl.arena.weights import substrate
from refimpl.compression.low_rank.asvd import ASVD, scaled_basis
from refimpl.compression.low_rank.factored import WholeWeight, project, rank_for
from refimpl.compression.low_rank.svd import SVD
from refimpl.compression.low_rank.svd_llm import SVDLLM, gram, update, whiten_then_update, whitened
from refimpl.compression.protocol import apply, compress
from refimpl.model.train import perplexity


def layer(generator, out=9, columns=14, rows=60):
    """A weight and correlated inputs, float64."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(out, columns), draw(rows, columns) @ (
        torch.eye(columns, dtype=torch.float64) + draw(columns, columns) / 2
    )


def singular(generator, kind):
    """A layer whose inputs do not reach all directions."""
    weight, inputs = layer(generator, rows=5 if kind == "few rows" else 60)
    if kind == "dead inputs":
        inputs[:, [0, 3, 7]] = 0
    if kind == "equal inputs":
        inputs[:, 4] = inputs[:, 9]
    return weight, inputs


KINDS = ("full rank", "few rows", "dead inputs", "equal inputs")


def squared_error(weight, dense, inputs):
    return (inputs @ (dense - weight).T).square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_loss_is_the_singular_values_left_out(kind, rank, generator):
    """Oracle: the paper's theorem, truncation loss equals the singular values left out, for any Gram matrix."""
    weight, inputs = singular(generator, kind)
    values = torch.linalg.svdvals(whitened(weight, gram(inputs)))
    dense = SVDLLM(rank=rank)(weight, inputs).dense()
    assert_close(squared_error(weight, dense, inputs), values[rank:].square().sum())
    assert squared_error(weight, SVD(rank=rank)(weight).dense(), inputs) > values[rank:].square().sum() * 1.05


def test_each_singular_value_is_the_loss_of_leaving_it_out(generator):
    """Oracle: the theorem for one value alone, one after the other."""
    weight, inputs = layer(generator)
    u, values, _ = torch.linalg.svd(whitened(weight, gram(inputs)), full_matrices=False)
    for i, value in enumerate(values):
        others = torch.cat([u[:, :i], u[:, i + 1 :]], dim=1)
        assert_close(squared_error(weight, others @ others.T @ weight, inputs).sqrt(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_that_rank_is_nearer(kind, generator):
    """Oracle: Eckart and Young for the output X Wᵀ itself, by numpy's route over the rows; and random others are worse."""
    weight, inputs = singular(generator, kind)
    dense = SVDLLM(rank=3)(weight, inputs).dense()
    least = torch.linalg.svdvals(inputs @ weight.T)[3:].square().sum()
    assert_close(squared_error(weight, dense, inputs), least)
    for _ in range(10):
        other = (
            dense
            + 0.05 * torch.randn(9, 3, generator=generator, dtype=torch.float64) @ SVDLLM(rank=3)(weight, inputs).right
        )
        assert squared_error(weight, other, inputs) > least


def test_as_the_paper_writes_it(generator):
    """Oracle: U Σ Vᵀ S⁻¹ with S from Cholesky, written out with an inverse."""
    weight, inputs = layer(generator)
    s = torch.linalg.cholesky(inputs.T @ inputs)
    u, values, vh = torch.linalg.svd(weight @ s, full_matrices=False)
    expected = u[:, :4] @ torch.diag(values[:4]) @ vh[:4] @ torch.linalg.inv(s)
    assert_close(SVDLLM(rank=4)(weight, inputs).dense(), expected)
    assert_close(whitened(weight, gram(inputs)), weight @ s)


def test_whitened_inputs_are_orthonormal(generator):
    """Oracle: the definition, SS' = X'X; a singular matrix gets a root too."""
    for kind in KINDS:
        _, inputs = singular(generator, kind)
        root = whitened(torch.eye(14, dtype=torch.float64), gram(inputs))
        assert_close(root @ root.T, inputs.T @ inputs)


def test_white_inputs_give_the_svd(generator):
    """Oracle: the relation `generalizes`. Orthogonal inputs of one size see no direction more than another."""
    weight, _ = layer(generator)
    inputs = 3 * torch.linalg.qr(torch.randn(40, 14, generator=generator, dtype=torch.float64)).Q
    assert_close(SVDLLM(rank=4)(weight, inputs).dense(), SVD(rank=4)(weight).dense())
    inputs[:, 0] *= 5
    assert not torch.allclose(SVDLLM(rank=4)(weight, inputs).dense(), SVD(rank=4)(weight).dense())


def test_worked_by_hand():
    """Oracle: by hand. Outputs 2 x 1 and 1 x 10: the second is kept."""
    weight = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    dense = SVDLLM(rank=1)(weight, torch.diag(torch.tensor([1.0, 10.0, 1.0, 1.0]))).dense()
    assert_close(dense, torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    assert_close(SVD(rank=1)(weight).dense(), torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_size_of_the_data_does_not_matter(generator):
    """Oracle: scaling. Ten times the inputs, or each of them twice, is the same weight; factors too."""
    weight, inputs = layer(generator)
    first = SVDLLM(rank=3)(weight, inputs)
    for other in (10 * inputs, torch.cat([inputs, inputs])):
        assert_close(SVDLLM(rank=3)(weight, other).dense(), first.dense())
    assert_close(first.left.norm(dim=0), first.right.norm(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_least_squares(kind, generator):
    """Oracle: LAPACK's least squares of the outputs on the inner features; where inputs are missing, in its residual."""
    weight, inputs = layer(generator)
    packed = SVDLLM(rank=3)(weight, inputs)
    _, shifted = singular(generator, kind)
    updated = update(weight, packed, shifted)
    features = shifted @ packed.right.T
    expected = torch.linalg.lstsq(features, shifted @ weight.T, driver="gelsd").solution
    assert_close(features @ updated.left.T, features @ expected)
    assert torch.equal(updated.right, packed.right)
    assert squared_error(weight, updated.dense(), shifted) < squared_error(weight, packed.dense(), shifted) * 0.999


def test_update_for_the_same_inputs_changes_nothing(generator):
    """Oracle: the theorem. What is optimal for X is optimal for X' = X; a weight left whole needs no update."""
    weight, inputs = layer(generator)
    packed = SVDLLM(rank=3)(weight, inputs)
    assert_close(update(weight, packed, inputs).dense(), packed.dense())
    whole = WholeWeight(weight)
    assert update(weight, whole, inputs) is whole


def test_update_leaves_what_the_inputs_do_not_say(generator):
    """Oracle: by hand. Inputs along one inner feature move the first factor in that direction only."""
    weight, inputs = layer(generator)
    packed = SVDLLM(rank=3)(weight, inputs)
    one = torch.linalg.pinv(packed.right)[:, :1].T  # the inner features of this input are (1, 0, 0)
    updated = update(weight, packed, one)
    assert_close(updated.left[:, 1:], packed.left[:, 1:])
    assert not torch.allclose(updated.left[:, 0], packed.left[:, 0])


def test_over_a_model_layers_are_whitened_first_and_updated_after(generator):
    """Oracle: by hand, layer by layer: Gram matrices from the original model, updates from what compressed layers return."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    x = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    method = SVDLLM(rank=2)
    small = whiten_then_update(model, [x[:20], x[20:]], method)
    first, second = (model[i].weight.detach() for i in (0, 2))
    with torch.no_grad():
        hidden = model[1](model[0](x))
        arriving = torch.tanh(x @ method(first, x).dense().T + model[0].bias)
        assert_close(small[0].weight, method(first, x).dense())
        assert_close(small[2].weight, update(second, method(second, hidden), arriving).dense())
        assert not torch.allclose(small[2].weight, method(second, hidden).dense())
        assert not torch.allclose(small[2].weight, compress(model, method, [x])[2].weight)


def test_over_every_architecture(build, tokens, logits):
    """Oracle: the model. Where nothing is removed the procedure is the identity."""
    model = build()
    assert torch.equal(logits(whiten_then_update(model, [tokens], SVDLLM(ratio=0.0)), tokens), logits(model, tokens))
    small = whiten_then_update(model, [tokens], SVDLLM(ratio=0.4))
    assert 0 < (logits(small, tokens) - logits(model, tokens)).norm() / logits(model, tokens).norm() < 1.5


@pytest.mark.parametrize("method", [SVDLLM(ratio=0.0), SVDLLM(rank=5)])
def test_factors_that_would_be_no_smaller_are_not_made(method, generator):
    """Oracle: the weight, bit by bit. 5 (8 + 12) numbers are more than 8 × 12."""
    weight, inputs = torch.randn(8, 12, generator=generator), torch.randn(20, 12, generator=generator)
    assert torch.equal(method(weight, inputs).dense(), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float64 result of the same numbers; half precision rounds the factors."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    packed = SVDLLM(rank=3)(weight, inputs)
    assert packed.dense().dtype == packed.left.dtype == packed.right.dtype == dtype
    assert packed.nbytes == 3 * (9 + 14) * weight.element_size()
    expected = SVDLLM(rank=3)(weight.double(), inputs.double()).dense()
    atol = max(1e-12, 20 * torch.finfo(dtype).eps)  # 3 products of rounded factors
    assert_close(packed.dense().double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "message"), [({"ratio": 1.0}, "ratio=1.0"), ({"rank": 0}, "rank=0 must be at least 1")]
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SVDLLM(**change)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "SVDLLM needs the layer's inputs: pass `inputs`, or `calibration`"),
        (torch.zeros(3, 4), "inputs are all zero"),
        (torch.ones(3, 5), "must be .n, in. with n >= 1 and in = 4"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        SVDLLM()(torch.ones(5, 4), inputs)


def test_the_procedure_over_a_model_needs_texts():
    with pytest.raises(ValueError, match="needs texts: pass `calibration`"):
        whiten_then_update(nn.Sequential(nn.Linear(8, 8)), [], SVDLLM())


# Claims


def split(generator):
    """A layer with inputs to calibrate on and others to measure on, float64."""
    weight, inputs = (tensor.double() for tensor in substrate(generator))
    return weight, inputs[:768], inputs[768:]


def output_error(weight, dense, inputs):
    return float((inputs @ (dense - weight).T).norm() / (inputs @ weight.T).norm())


def test_claim_loss_is_what_is_left_out(claim, generator):
    """Squared output error over the squared singular values left out, on a layer of 256 × 512 at ratio 0.4."""
    weight, inputs, _ = split(generator)
    packed = SVDLLM(ratio=0.4)(weight, inputs)
    left_out = torch.linalg.svdvals(whitened(weight, gram(inputs)))[packed.left.shape[1] :].square().sum()
    claim("svd-llm", "loss-is-what-is-left-out", float(squared_error(weight, packed.dense(), inputs) / left_out))


def test_claim_smallest_values_first(claim, generator):
    """Share of pairs of singular values of which leaving out the smaller one moves the output more."""
    weight, inputs, _ = split(generator)
    u, _, _ = torch.linalg.svd(whitened(weight, gram(inputs)), full_matrices=False)
    loss = (inputs @ weight.T @ u).norm(dim=0)  # what leaving out each direction alone costs
    i, j = torch.triu_indices(len(loss), len(loss), 1)
    claim("svd-llm", "smallest-values-first", float((loss[i] < loss[j] * (1 - 1e-9)).double().mean()))


def test_claim_beats_asvd(claim, generator):
    """Output error on new inputs over that of ASVD's scaling at the same rank, the worst of ratios 0.2, 0.4 and 0.6."""
    weight, inputs, new = split(generator)
    worst = 0.0
    for ratio in (0.2, 0.4, 0.6):
        scaled = project(weight, scaled_basis(weight, inputs.abs().mean(0)), rank_for(*weight.shape, ratio))
        ours = output_error(weight, SVDLLM(ratio=ratio)(weight, inputs).dense(), new)
        worst = max(worst, ours / output_error(weight, scaled.dense(), new))
    claim("svd-llm", "beats-asvd", worst)


def texts(subject, generator):
    """Eight calibration windows of 128 tokens, and held-out text."""
    text, held_out = subject.text("train", 20_000), subject.text("held-out", 2048)
    starts = torch.randint(len(text) - 128, (8, 1), generator=generator)
    return [text[starts + torch.arange(128)]], held_out


def test_claim_beats_asvd_in_perplexity(claim, generator):
    """Perplexity of held-out text over that with ASVD, its ranks searched on all calibration texts; the testbed's model, ratio 0.2.

    It is the search that wins: with one ratio for all layers ASVD's scaling leaves a perplexity several times as high.
    """
    subject = testbed.subject(None, "cpu")
    calibration, held_out = texts(subject, generator)

    def one_ratio(weight, inputs):
        return project(weight, scaled_basis(weight, inputs.abs().mean(0)), rank_for(*weight.shape, 0.2))

    ours, theirs, unsearched = (
        perplexity(apply(method, subject.model, calibration), held_out, 256)
        for method in (SVDLLM(ratio=0.2), ASVD(ratio=0.2), one_ratio)
    )
    assert unsearched > 4 * ours
    claim("svd-llm", "beats-asvd-in-perplexity", ours / theirs)


def test_claim_update_helps(claim, generator):
    """Perplexity of held-out text after whitening and update over that after whitening alone; the testbed's model, ratio 0.6."""
    subject = testbed.subject(None, "cpu")
    calibration, held_out = texts(subject, generator)
    method, covariances = SVDLLM(ratio=0.6), []

    def watch(weight, inputs):
        covariances.append(gram(inputs))
        return WholeWeight(weight)

    compress(subject.model, watch, calibration)
    waiting = iter(covariances)
    alone = compress(subject.model, lambda weight, inputs: method._truncate(weight, next(waiting)), calibration)
    both = whiten_then_update(subject.model, calibration, method)
    claim("svd-llm", "update-helps", perplexity(both, held_out, 256) / perplexity(alone, held_out, 256))
