"""LSQ: both gradients by the paper's formulas, point by point; gradcheck does not apply, since rounding has no derivative."""

import copy
import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.qat.lsq import LSQ, LSQLinear, bounds, first_step, lsq
from refimpl.compression.quantization.qat.ste_qat import STEQAT
from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.model.train import next_token_loss, perplexity, train, windows
from tests.compression.quantization.qat.conftest import BATCH, LENGTH


def formula(v, s, q_n, q_p):
    """Eqs. (1), (2), (3) and (5), for one value: quantized, derivative by the step, derivative by the value."""
    ratio = v / s
    if ratio <= -q_n:
        return -q_n * s, -q_n, 0.0
    if ratio >= q_p:
        return q_p * s, q_p, 0.0
    return round(ratio) * s, -ratio + round(ratio), 1.0


@pytest.mark.parametrize(("bits", "unsigned"), [(2, False), (3, False), (4, False), (3, True)])
def test_gradients_by_formula(bits, unsigned):
    """Oracle: the paper's equations written out for one value at a time: inside, at a level, beside a transition, at both edges,
    beyond them."""
    q_n, q_p = bounds(bits, unsigned=unsigned)
    ratios = [
        0.0,
        0.2,
        0.499,
        0.501,
        1.0,
        -0.3,
        -0.7,
        q_p - 0.3,
        q_p,
        q_p + 0.4,
        q_p + 7,
        -q_n + 0.3,
        -q_n,
        -q_n - 0.2,
        -q_n - 9,
    ]
    s = 0.5
    for ratio in ratios:
        v = torch.tensor([ratio * s], requires_grad=True)
        step = torch.tensor(s, requires_grad=True)
        y = lsq(v, step, q_n, q_p)
        (3 * y).backward()
        value, by_step, by_value = formula(ratio * s, s, q_n, q_p)
        assert y.item() == pytest.approx(value, abs=1e-6), ratio
        assert step.grad.item() == pytest.approx(3 * by_step / math.sqrt(q_p), abs=1e-5), ratio
        assert v.grad.item() == 3 * by_value, ratio


@pytest.mark.parametrize(("shape", "steps"), [((4, 6), ()), ((4, 6), (4, 1))])
def test_a_steps_gradient_sums_what_shares_it_and_is_scaled(shape, steps, generator):
    """Oracle: the sum of single derivatives times 1/sqrt(N Q_P), N values to a step."""
    v = torch.randn(shape, generator=generator)
    step = torch.full(steps, 0.4).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    (lsq(v, step, 2, 1) * upstream).sum().backward()
    single = torch.tensor([[formula(x, 0.4, 2, 1)[1] for x in row] for row in v.tolist()]) * upstream
    expected = single.sum(dim=1, keepdim=True) / math.sqrt(6) if steps else single.sum() / math.sqrt(24)
    assert_close(step.grad, expected)


def test_of_inputs_the_features_of_a_token_count():
    """Oracle: the sum of single derivatives times 1/sqrt(in Q_P): twice the tokens at half the weight give the same gradient."""
    model = LSQ(bits=8, activation_bits=2).prepare(nn.Sequential(nn.Linear(3, 1, bias=False)))
    layer, x = model[0], torch.tensor([[0.3, -1.2, 4.0]])
    layer(x)
    with torch.no_grad():
        layer.input_step.fill_(0.5)
    grads = []
    for rows in (x, torch.cat([x, x])):
        layer.input_step.grad = None
        layer.read(rows).sum().div(len(rows)).backward()
        grads.append(layer.input_step.grad.item())
    expected = sum(formula(v, 0.5, 2, 1)[1] for v in x[0].tolist()) / math.sqrt(3 * 1)
    assert grads == pytest.approx([expected, expected]) and expected != 0


def test_first_step_by_hand():
    """Oracle: by hand: 2 * mean(4, 2, 0, 2) / sqrt(Q_P), of a 3-bit weight; zeros give a step that is not 0."""
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data.copy_(torch.tensor([[4.0, -2.0, 0.0, 2.0]]))
    layer = LSQ(bits=3).prepare(model)[0]
    assert layer.step.item() == pytest.approx(2 * 2 / math.sqrt(3))
    assert first_step(torch.zeros(1, 4), 3).item() > 0
    model[0].weight.data.zero_()
    held = LSQ(bits=3, activation_bits=None).convert(LSQ(bits=3, activation_bits=None).prepare(model))[0].compressed
    assert not held.dense().any()


@pytest.mark.parametrize(("low", "levels"), [(0.0, (0, 15)), (-0.01, (8, 7))])
def test_the_first_batch_places_the_step_of_inputs(low, levels):
    """Oracle: by hand: unsigned without a negative input, signed with one; later batches do not move it."""
    model = LSQ().prepare(nn.Sequential(nn.Linear(2, 1)))
    x = torch.tensor([[low, 3.0], [1.0, 4.0]])
    model(x)
    layer = model[0]
    expected = 2 * x.abs().mean().item() / math.sqrt(levels[1])
    assert layer._input_bounds() == levels and layer.input_step.item() == pytest.approx(expected)
    model(100 * x)
    assert layer.input_step.item() == pytest.approx(expected)
    assert layer.read(torch.tensor([1e9])).item() == pytest.approx(levels[1] * expected)
    assert layer.read(torch.tensor([-1e9])).item() == pytest.approx(-levels[0] * expected)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_what_is_stored_is_what_was_trained(granularity, generator):
    """Oracle: the rounded weight itself; bytes by arithmetic: codes, and four bytes a step. A negative step counts by its size."""
    model = nn.Sequential(nn.Linear(33, 5, bias=False))
    method = LSQ(bits=3, activation_bits=None, granularity=granularity, group_size=8)
    student = method.prepare(model)
    with torch.no_grad():
        student[0].step.mul_(-0.7)
    held = method.convert(student)[0].compressed
    steps = {"tensor": 1, "channel": 5, "group": 25}[granularity]
    assert isinstance(held, QuantizedWeight) and held.nbytes == -(-165 // 8) * 3 + 4 * steps
    assert torch.equal(held.dense(), student[0].rounded())
    assert len(held.dense()[0].unique()) > 2


def test_the_output_layer_has_8_bits_where_it_has_a_weight_of_its_own():
    """Oracle: the paper's rule for the last layer; where that is the embedding, it stays."""
    sizes = {"vocabulary": 9, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 6}
    model, tied = Decoder(Config(**sizes)), Decoder(Config(**sizes, tied_embeddings=True))
    layers = dict(LSQ(bits=2, activation_bits=3).prepare(model).named_modules())
    bits = {name: (m.bits, m.input_bits) for name, m in layers.items() if isinstance(m, LSQLinear)}
    assert bits.pop("lm_head") == (8, 8) and set(bits.values()) == {(2, 3)}
    tied = LSQ().prepare(tied)
    assert isinstance(tied.embedding, nn.Embedding) and {
        m.bits for m in tied.modules() if isinstance(m, LSQLinear)
    } == {4}
    assert LSQ(activation_bits=None).prepare(model).lm_head.input_bits is None
    assert LSQ(edges=()).prepare(model).lm_head.bits == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 must be 2 to 8: with 1 there is no positive level"),
        ({"activation_bits": 9}, "activation_bits=9 must be 2 to 8, or None"),
        ({"granularity": "row"}, "granularity='row' must be"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"edges": "lm_head"}, r"edges='lm_head' must be a list of patterns: \['lm_head'\]"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LSQ(**change)


def test_inputs_that_never_came_are_named():
    with pytest.raises(ValueError, match="layer '0' has seen no inputs, and has no step for them"):
        LSQ().convert(LSQ().prepare(nn.Sequential(nn.Linear(2, 1))))


STEPS = 40


@pytest.fixture(scope="module")
def learned(trained):
    """`learned(method)`: the small language model after training through a method, or without one, each trained once; and its loss on
    unseen text.
    """

    @cache
    def after(method):
        model = method.prepare(trained.model) if method else copy.deepcopy(trained.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
        batches = windows(trained.text, BATCH, LENGTH, torch.Generator().manual_seed(1))
        train(model, optimizer, batches, STEPS, schedule=lambda progress: 1 - progress)
        small = method.convert(model) if method else model
        return model, math.log(perplexity(small, trained.unseen, LENGTH, batch=64))

    return after


def test_claim_balance(trained, claim):
    """Median over layers of the step's relative gradient over the weights', 2 bits, with g and, divided by it, without."""
    model = LSQ(bits=2, edges=()).prepare(trained.model)
    next_token_loss(model, next(windows(trained.text, BATCH, LENGTH, torch.Generator().manual_seed(2)))).backward()
    scaled, plain = [], []
    for layer in model.modules():
        if isinstance(layer, LSQLinear):
            weights = layer.weight.grad.norm() / layer.weight.detach().norm()
            scaled.append(layer.step.grad.abs() / layer.step.detach() / weights)
            plain.append(scaled[-1] * math.sqrt(layer.weight.numel() * 1))
    claim("lsq", "balanced-updates", torch.stack(scaled).median())
    claim("lsq", "unbalanced-without-scale", torch.stack(plain).median())


@pytest.mark.parametrize("bits", [2, 4])
def test_claim_beats_statistics(bits, learned, claim):
    """Loss above that of full precision over that with steps from the range, weights and activations in these bits, all after 40 steps."""
    base = learned(None)[1]
    ours = learned(LSQ(bits=bits, activation_bits=bits, edges=()))[1]
    theirs = learned(STEQAT(bits=bits, activation_bits=bits, granularity="tensor", symmetric=True))[1]
    claim("lsq", f"beats-statistics-at-{bits}-bits", (ours - base) / (theirs - base))


def test_claim_not_the_least_error(learned, claim):
    """Mean over layers of the distance between the learned step of a weight and that of least squared error, 2 bits."""
    distances = []
    for layer in learned(LSQ(bits=2, activation_bits=2, edges=()))[0].modules():
        if isinstance(layer, LSQLinear):
            step, weight = layer.step.detach().abs(), layer.weight.detach()
            tried = step * torch.arange(2, 201)[:, None, None] / 100
            errors = ((weight / tried).round().clamp(-2, 1) * tried - weight).square().sum(dim=(1, 2))
            distances.append((tried[errors.argmin()].squeeze() - step).abs() / step)
    claim("lsq", "not-the-least-error", torch.stack(distances).mean())
