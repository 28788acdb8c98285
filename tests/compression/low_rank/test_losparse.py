"""LoSparse: Algorithm 1 written out, the schedule by hand, and what is stored."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl.compression.low_rank import losparse
from refimpl.compression.low_rank.factored import FactoredPlusRows, FactoredWeight, WholeWeight
from refimpl.compression.low_rank.layers import linear_layers
from refimpl.compression.low_rank.losparse import (
    LoSparse,
    LowRankPlusSparse,
    most_important_rows,
    remaining_share,
    warm_up_and_decay,
)
from refimpl.compression.low_rank.svd import truncate
from refimpl.compression.protocol import CompressedLinear
from refimpl.model.linear import weight_of
from refimpl.model.train import perplexity
from tests.compression.conftest import decoder


def tiny():
    """A language model of one layer: token to features to logits, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 7)).double()


def written_out(model, batches, *, ratio, rank_share, steps, lr, beta, every):
    """Algorithm 1 in plain tensors, with Adam by hand: dense weights of both layers, and the rows that remain."""
    embedding = model[0].weight.detach().clone()
    biases = [model[i].bias.detach().clone() for i in (1, 3)]
    lefts, rights, residuals = [], [], []
    for i in (1, 3):
        weight = model[i].weight.detach()
        rank = max(1, int(rank_share * weight.numel() / sum(weight.shape)))
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        lefts.append(u[:, :rank] * s[:rank].sqrt())
        rights.append(s[:rank, None].sqrt() * vh[:rank])
        residuals.append(weight - lefts[-1] @ rights[-1])
    values = [embedding, *biases, *lefts, *rights, *residuals]
    total = sum(s.numel() for s in residuals)
    final = ((1 - ratio) * total - sum(x.numel() for x in [*lefts, *rights])) / total
    m, v = [torch.zeros_like(x) for x in values], [torch.zeros_like(x) for x in values]
    window, average, rows = [0.0, 0.0], [0.0, 0.0], [torch.ones(15) > 0, torch.ones(7) > 0]
    n = averaged = 0
    for t in range(1, steps + 1):
        tokens = batches[(t - 1) % len(batches)]
        leaves = [x.clone().requires_grad_() for x in values]
        e, b1, b2, l1, l2, r1, r2, s1, s2 = leaves
        hidden = torch.tanh(e[tokens] @ (l1 @ r1 + s1).T + b1)
        logits = hidden @ (l2 @ r2 + s2).T + b2
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        window = [past + (s.detach() * s.grad).abs() for past, s in zip(window, (s1, s2), strict=True)]
        n += 1
        first = losparse.FIRST * steps
        warm = losparse.WARM_UP * steps
        rate = lr * min(1, t / warm, (steps - t + 1) / (steps - warm))
        for k, leaf in enumerate(leaves):
            m[k] = 0.9 * m[k] + 0.1 * leaf.grad
            v[k] = 0.999 * v[k] + 0.001 * leaf.grad**2
            values[k] = values[k] - rate * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-8)
        if t % every == 0 or t == steps:
            average = [beta * a + (1 - beta) * w / n for a, w in zip(average, window, strict=True)]
            window, n, averaged = [0.0, 0.0], 0, averaged + 1
        last = losparse.LAST * steps
        share = 1.0
        if t >= steps - last:
            share = final
        elif t > first:
            share = final + (1 - final) * (1 - (t - first) / (steps - first - last)) ** 3
        if averaged and (t >= steps - last or (t % every == 0 and share < 1)):
            ranked = sorted(
                ((float(a[i].mean()), k, i) for k, a in enumerate(average) for i in range(len(a))), reverse=True
            )
            rows, used = [torch.zeros(15) > 0, torch.zeros(7) > 0], 0
            for _, k, i in ranked:
                used += residuals[k].shape[1]
                if used > share * total + 1e-6:
                    break
                rows[k][i] = True
            for k in range(2):
                values[7 + k] = values[7 + k] * rows[k][:, None]
    dense = [values[3 + k] @ values[5 + k] + values[7 + k] for k in range(2)]
    return dense, rows, values


@pytest.mark.parametrize("every", [1, 4])
def test_equals_the_algorithm_written_out(every, generator):
    """Oracle: Algorithm 1 in plain tensors, float64, Adam's steps by hand; all parameters move."""
    model, batches = tiny(), [torch.randint(0, 7, (3, 6), generator=generator) for _ in range(3)]
    settings = {"steps": 21, "lr": 1e-2, "beta": 0.8, "every": every}
    small = LoSparse(ratio=0.4, low_rank=0.2, **settings)(model, batches)
    dense, rows, values = written_out(model, batches, ratio=0.4, rank_share=0.2, **settings)
    for k, place in enumerate((1, 3)):
        assert_close(small[place].weight, dense[k])
        assert_close(small[place].bias, values[1 + k])
        assert 0 < rows[k].sum() < len(rows[k])
        assert small[place].compressed.index.tolist() == rows[k].nonzero().flatten().tolist()
    assert_close(small[0].weight.detach(), values[0])
    assert not torch.allclose(small[0].weight, model[0].weight)


def test_starts_as_the_weight(generator):
    """Oracle: the layer. UV is its best product of that rank, S the rest."""
    layer, x = nn.Linear(12, 9), torch.randn(2, 5, 12, generator=generator)
    part = LowRankPlusSparse(layer, 3)
    assert_close(part(x), layer(x))
    assert_close(part.weight, layer.weight)
    left, right = truncate(layer.weight.detach(), 3)
    assert_close(part.left @ part.right, left @ right)
    assert part.sparse.abs().max() > 0.01


def test_schedule_by_hand():
    """Oracle: by hand. Halfway between the phases an eighth of the way down remains."""
    first, last = 55, 725
    assert remaining_share(first, 1000, 0.2) == (1.0, False)
    share, late = remaining_share((first + last) // 2, 1000, 0.2)
    assert share == pytest.approx(0.2 + 0.8 / 8) and not late
    assert remaining_share(last, 1000, 0.2) == (0.2, True) == remaining_share(1000, 1000, 0.2)
    falling = [remaining_share(t, 1000, 0.2)[0] for t in range(1, 1001)]
    assert falling == sorted(falling, reverse=True)
    assert remaining_share(1, 1, 0.3) == (0.3, True)  # a single step is the last phase


def test_learning_rate_by_hand():
    """Oracle: by hand. Up for 39 steps of 1000, then down, never to zero before the end."""
    rates = [warm_up_and_decay(t, 1000) for t in range(1, 1001)]
    assert max(rates) == rates[38] == 1.0 and min(rates) > 0
    assert rates[12] == pytest.approx(1 / 3) and rates[520] == pytest.approx(480 / 961)


def test_rows_are_ranked_over_all_matrices():
    """Oracle: by hand. Scores are means, so that long rows have no advantage; ties go to the first."""
    short, long = torch.tensor([[4.0, 4.0], [1.0, 1.0]]), torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 5.0]])
    shares = {
        0.0: ([], []),
        2 / 12: ([0], []),
        0.5: ([0], [0]),
        0.7: ([0], [0]),
        10 / 12: ([0], [0, 1]),
        1.0: ([0, 1], [0, 1]),
    }
    for share, expected in shares.items():
        rows = most_important_rows([short, long], share)
        assert tuple(kept.nonzero().flatten().tolist() for kept in rows) == expected
    assert most_important_rows([torch.ones(3, 2)], 0.7)[0].tolist() == [True, True, False]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_budget_is_kept(build, ratio, tokens):
    """Oracle: counting the numbers held, without indices; not one row less than fits."""
    model = build()
    small = LoSparse(ratio=ratio, steps=3)(model, [tokens])
    layers = linear_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    packed = [small.get_submodule(name).compressed for name in layers]
    held = sum(buffer.numel() for part in packed for buffer in part.buffers() if buffer.is_floating_point())
    assert held <= (1 - ratio) * total
    if not any(isinstance(part, WholeWeight) for part in packed):
        assert held > (1 - ratio) * total - max(weight_of(layer).shape[1] for layer in layers.values())


def test_no_residual_and_no_product(tokens):
    """Oracle: the definition. All of S is pruned where the product is all that remains; at rank 0 S is all there is."""
    alone = LoSparse(ratio=0.6, low_rank=0.4, steps=3)(decoder(), [tokens]).layers[0].feed_forward.up_proj.compressed
    assert type(alone) is FactoredWeight
    assert alone.left.shape[1] == int(0.4 * 32 * 40 / 72)
    pruned = LoSparse(ratio=0.6, low_rank=0.0, steps=3)(decoder(), [tokens])
    for name in linear_layers(decoder()):
        part = pruned.get_submodule(name).compressed
        dense = part.dense()
        if isinstance(part, FactoredPlusRows):
            gone = torch.ones(len(dense), dtype=torch.bool)
            gone[part.index.long()] = False
            assert (dense[gone] == 0).all() and gone.any()


def test_a_layer_that_keeps_its_rows_is_whole(generator):
    """Oracle: arithmetic. The product and most rows of S hold more than W."""
    part = LowRankPlusSparse(nn.Linear(12, 9), 3)
    rows = torch.ones(9, dtype=torch.bool)
    packed = part.compressed(rows, torch.float32).compressed
    assert isinstance(packed, WholeWeight) and packed.nbytes == 4 * 9 * 12
    assert_close(packed.dense(), part.weight.detach())
    assert isinstance(part.compressed(rows.logical_not(), torch.float32).compressed, FactoredWeight)


def test_without_learning_the_rest_is_the_weight(tokens):
    """Oracle: closed form. At lr 0 rows that remain are rows of W, and the others those of its truncated SVD."""
    model = decoder()
    small = LoSparse(ratio=0.5, lr=0.0, steps=10)(model, [tokens])
    for name, layer in linear_layers(model).items():
        part, weight = small.get_submodule(name).compressed, weight_of(layer)
        if not isinstance(part, FactoredPlusRows):
            continue
        left, right = truncate(weight, part.left.shape[1])
        expected = left @ right
        expected[part.index.long()] = weight[part.index.long()]
        assert_close(part.dense(), expected)


def test_what_neurons_share_is_kept(generator):
    """Oracle: planted. Of 32 neurons that share two directions, 8 have more of their own; a weight of half the size keeps both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 40), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 13))
    shared = torch.randn(32, 2, generator=generator) @ torch.randn(2, 40, generator=generator) / 40**0.5
    with torch.no_grad():
        model[1].weight.copy_(shared)
        model[1].weight[::4] += torch.randn(8, 40, generator=generator) / 40**0.5
    text, weight = [torch.randint(0, 13, (8, 12), generator=generator)], model[1].weight
    both, rows = (
        LoSparse(ratio=0.5, low_rank=share, steps=20, every=2)(model, text)[1].weight for share in (0.15, 0.0)
    )
    assert (both - weight).norm() < 0.25 * weight.norm() < 0.5 * (rows - weight).norm()


def test_training_lowers_the_loss(trained):
    """Oracle: the same compression without learning, measured on held-out text."""
    model, calibration, held_out = trained
    still, learned = (LoSparse(ratio=0.6, lr=lr)(model, calibration) for lr in (0.0, 1e-3))
    assert perplexity(learned, held_out, 32) < 0.9 * perplexity(still, held_out, 32)


def test_nothing_removed_is_the_identity(tokens, logits):
    """Oracle: the model; nothing is trained, and no data asked for."""
    model = decoder()
    assert torch.equal(logits(LoSparse(ratio=0.0)(model), tokens), logits(model, tokens))


def test_frozen_parameters_stay_frozen(tokens):
    """Oracle: the parameters before. What takes no gradient is not trained; what does, does so afterwards."""
    model = decoder()
    model.embedding.weight.requires_grad_(False)
    small = LoSparse(ratio=0.5, lr=1e-2, steps=5)(model, [tokens])
    assert torch.equal(small.embedding.weight, model.embedding.weight)
    assert not torch.equal(small.norm.weight, model.norm.weight)
    assert not small.embedding.weight.requires_grad and small.norm.weight.requires_grad
    assert all(p.grad is None for p in [*small.parameters(), *model.parameters()])


def test_half_precision_is_trained_in_float32(tokens):
    """Oracle: the float32 training of the same weights, rounded at the end."""
    model = decoder().bfloat16()
    with torch.no_grad():
        small = LoSparse(ratio=0.5, lr=1e-3, steps=8)(model, [tokens])
        expected = LoSparse(ratio=0.5, lr=1e-3, steps=8)(copy.deepcopy(model).float(), [tokens])
    assert {t.dtype for t in small.state_dict().values()} == {torch.bfloat16, torch.int32}
    for name, value in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], value.to(small.state_dict()[name].dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 must be 0 \(nothing is removed\) to below 1"),
        ({"ratio": 0.5, "low_rank": 0.6}, "low_rank=0.6 must be 0 to 1 - ratio = 0.5"),
        ({"low_rank": -0.1}, "low_rank=-0.1"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"lr": -1.0}, "lr=-1.0 must be 0 or more"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"every": 0}, "every=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LoSparse(**change)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((), "needs texts to train on: pass `calibration`"),
        (torch.ones(1, 2), "must be a list of batches"),
        ([torch.tensor([[61, 1]])], "can't take calibration batch 0"),
        ([torch.ones(1, 2, 32)], "must hold tokens"),
        ([torch.tensor([[1]])], "no token with one before it"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        LoSparse()(decoder(), calibration)


def test_layers_that_are_not_reached_are_refused(tokens):
    model = decoder()
    model.idle = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="does not depend on layer 'idle'"):
        LoSparse()(model, [tokens])


def test_compressed_layers_hold_what_is_trained(tokens):
    """Oracle: types. No parameter of the training is left behind."""
    small = LoSparse(ratio=0.5, steps=2)(decoder(), [tokens])
    assert not any(isinstance(module, LowRankPlusSparse) for module in small.modules())
    assert all(isinstance(small.get_submodule(name), CompressedLinear) for name in linear_layers(decoder()))


@pytest.fixture(scope="module")
def perplexities(trained):
    """Perplexity of held-out text by share in the product, at ratio 0.6 and after the same training."""
    model, calibration, held_out = trained
    return {
        share: perplexity(
            LoSparse(ratio=0.6, low_rank=share, steps=30, every=5, lr=1e-3)(model, calibration), held_out, 32
        )
        for share in (0.0, 0.1, 0.4)
    }


def test_claim_beats_low_rank_alone(claim, perplexities):
    """Perplexity over that of the product alone."""
    claim("losparse", "beats-low-rank-alone", perplexities[0.1] / perplexities[0.4])


def test_claim_beats_pruning_alone(claim, perplexities):
    """Perplexity over that of pruning alone."""
    claim("losparse", "beats-pruning-alone", perplexities[0.1] / perplexities[0.0])
