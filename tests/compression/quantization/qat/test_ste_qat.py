"""STE-QAT: gradients by hand and torchao's, ranges by hand, and round-to-nearest as what is stored."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

from refimpl.compression.protocol import compress
from refimpl.compression.quantization.qat.ste_qat import STEQAT, in_range
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.train import perplexity, train, windows
from tests.compression.quantization.qat.conftest import BATCH, LENGTH


def one_layer(weight, method, bias=None):
    """A prepared model of one layer with this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None))
    model[0].weight = nn.Parameter(weight.clone())
    return method.prepare(model)


def test_gradient_by_hand():
    """Oracle: by hand. Range [-0.4, 2] at 2 bits: s = 0.8, z = round(0.5) = 0, so the grid is 0 to 2.4: -0.4 lies outside of it,
    becomes 0 and gets no gradient; 0.7 becomes 0.8, 1.3 becomes 1.6 and 2 becomes 1.6."""
    method = STEQAT(bits=2, group_size=4, activation_bits=None)
    model = one_layer(torch.tensor([[-0.4, 0.7, 1.3, 1.9999]]), method)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    model(x).sum().backward()
    assert_close(model[0].rounded().tolist(), [[0.0, 0.8, 1.6, 1.6]], rtol=1e-3, atol=1e-3)  # a scale of 16 bits
    assert model[0].weight.grad.tolist() == [[0.0, 10.0, 100.0, 1000.0]]


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.int4), (8, torch.int8)])
def test_value_and_gradient_equal_torchaos(bits, dtype, generator):
    """Oracle: torchao 0.18, symmetric grids of groups. It passes gradients up to half a step beyond the range, as it masks the
    rounded code; here they end where the range does, as in the source. Elsewhere all are equal."""
    weight = torch.randn(10, 32, generator=generator)
    step = 2.0 ** torch.randint(-3, 3, (10, 1), generator=generator)  # of which no digit is lost in 16 bits
    weight = (weight / weight.abs().amax(1, keepdim=True) * (2**bits - 1) / 2 * step).view(5, 64)
    upstream = torch.randn(5, 64, generator=generator)
    theirs = weight.clone().requires_grad_()
    out = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, group_size=32))(theirs)
    (out * upstream).sum().backward()
    method = STEQAT(bits=bits, group_size=32, symmetric=True, activation_bits=None)
    layer = one_layer(weight, method)[0]
    ours = layer.rounded()
    (ours * upstream).sum().backward()
    beyond = (weight.view(10, 32) / step > 2 ** (bits - 1) - 1).view(5, 64)
    assert beyond.any() and beyond.sum() < 20  # the largest of a group, where it is positive, and what is near it
    assert torch.equal(ours, out)
    assert torch.equal(layer.weight.grad[~beyond], theirs.grad[~beyond]) and not layer.weight.grad[beyond].any()


def test_ends_of_the_range_are_inside():
    """Oracle: by hand: levels -3 to 4 in steps of 0.5, with z = 6 of 15 codes: -3 and 4.5."""
    x, scale, zero = torch.tensor([-3.01, -3.0, 0.0, 4.5, 4.51]), torch.tensor(0.5), torch.tensor(6.0)
    assert in_range(x, scale, zero, 4).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_is_round_to_nearest_of_the_trained_weight(granularity, symmetric, generator):
    """Oracle: RTN; sizes that groups do not divide."""
    weight = torch.randn(5, 33, generator=generator)
    method = STEQAT(bits=3, granularity=granularity, group_size=8, symmetric=symmetric, activation_bits=None)
    model = one_layer(weight, method)
    expected = RTN(bits=3, granularity=granularity, group_size=8, symmetric=symmetric)(weight)
    held = method.convert(model)[0].compressed
    assert torch.equal(held.dense(), expected.dense()) and held.nbytes == expected.nbytes
    assert torch.equal(model[0].rounded(), expected.dense())


def test_ranges_of_inputs_are_averages_over_batches():
    """Oracle: by hand: [-1, 3], then 0.9 of that and 0.1 of [-2, 13]: [-1.1, 4]; in evaluation mode nothing is counted."""
    model = one_layer(torch.eye(2), STEQAT(bits=8, activation_bits=2, decay=0.9))
    for batch in ([[-1.0, 3.0]], [[13.0, -2.0]]):
        model(torch.tensor(batch))
    layer = model[0]
    assert_close(torch.stack(layer.reach()), torch.tensor([-1.1, 4.0]))
    model.eval()
    x = torch.tensor(
        [[-5.0, 0.7], [2.0, 9.0]], requires_grad=True
    )  # s = 1.7, z = round(0.65) = 1: levels -1.7, 0, 1.7, 3.4
    read = layer.read(x)
    assert_close(read, torch.tensor([[-1.7, 0.0], [1.7, 3.4]]))
    read.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert_close(torch.stack(layer.reach()), torch.tensor([-1.1, 4.0]))


def test_inputs_are_quantized_after_the_delay():
    """Oracle: by hand: the first two batches pass as they are, and are counted."""
    model = one_layer(torch.eye(2), STEQAT(bits=8, activation_bits=2, delay=2))
    x = torch.tensor([[0.3, 1.0]])
    seen = [model[0].read(x).tolist()[0][0] for _ in range(3)]
    assert_close(seen, [0.3, 0.3, 1 / 3])


def test_a_layer_that_saw_nothing_is_named():
    model = one_layer(torch.eye(2), STEQAT())
    for step in (lambda: STEQAT().convert(model), lambda: model.eval()(torch.ones(1, 2))):
        with pytest.raises(ValueError, match="layer '0' has seen no inputs, and has no grid for them: run a batch"):
            step()


def test_zero_weights_stay_zero_and_train(generator):
    """Oracle: a group of zeros has the level 0, in its range."""
    model = one_layer(torch.zeros(2, 4), STEQAT(activation_bits=None))
    model(torch.ones(1, 4)).sum().backward()
    assert not model[0].rounded().any() and (model[0].weight.grad == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"granularity": "row"}, "granularity='row' must be"),
        ({"activation_bits": 1}, "bits=1 of activations must be 2 to 8"),
        ({"decay": 1.0}, "decay=1.0 must be 0"),
        ({"delay": -1}, "delay=-1 must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        STEQAT(**change)


STEPS, RATE = 40, 3e-3


def more(trained, method=None):
    """The small language model after 40 more steps through a method's quantization, or without."""
    generator = torch.Generator().manual_seed(1)
    model = method.prepare(trained.model) if method else copy.deepcopy(trained.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    batches = windows(trained.text, BATCH, LENGTH, generator)
    train(model, optimizer, batches, STEPS, schedule=lambda progress: 1 - progress)
    return method.convert(model) if method else model


def unseen_loss(trained, model):
    return math.log(perplexity(model, trained.unseen, LENGTH, batch=64))


@pytest.fixture(scope="module")
def floating(trained):
    """The same training in full precision, the baseline that has read as much; and its loss."""
    model = more(trained)
    return model, unseen_loss(trained, model)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_claim_beats_rounding(bits, trained, floating, claim):
    """Loss added by 40 steps of training at these bits over that added by rounding what 40 steps in full precision gave: to the
    nearest level, and by GPTQ, calibrated on the text of as many steps.
    """
    model, loss = floating
    read = windows(trained.text, BATCH, LENGTH, torch.Generator().manual_seed(1))
    calibration = [next(read)[:, :-1] for _ in range(STEPS)]
    ours = unseen_loss(trained, more(trained, STEQAT(bits=bits, granularity="channel", activation_bits=None)))
    for name, rival in (
        ("rounding", RTN(bits=bits, granularity="channel")),
        ("gptq", GPTQ(bits=bits, group_size=None)),
    ):
        rounded = unseen_loss(trained, compress(model, rival, calibration))
        claim("ste-qat", f"beats-{name}-at-{bits}-bits", (ours - loss) / (rounded - loss))


def test_claim_eight_bits(trained, floating, claim):
    """Loss with weights and activations in 8 bits, one grid for each of a layer, over that in full precision, both after 40 steps."""
    ours = unseen_loss(trained, more(trained, STEQAT(bits=8, granularity="tensor")))
    claim("ste-qat", "eight-bits-near-float", ours / floating[1])
