"""ZeroQuant: grids of groups, gradients of the straight-through layer, and what distillation does to each block."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl import testbed
from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.weight_activation.zeroquant import (
    Learner,
    ZeroQuant,
    group_round,
)
from refimpl.model.config import Config
from refimpl.model.linear import weight_of
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import perplexity, train, windows


@pytest.mark.parametrize(("groups", "size"), [(1, 48 * 5), (6, 8 * 5), (48, 5), (100, 5)])
def test_groups_are_those_of_the_official_code(groups, size, generator):
    """Oracle: its grouping, the weight's numbers in order, in as many equal parts; never finer than a row here."""
    weight = torch.randn(48, 5, generator=generator, dtype=torch.float64)
    parts = weight.reshape(-1, size)
    step = parts.abs().amax(dim=1, keepdim=True) / 7
    integers, scale = group_round(weight, 4, groups)
    assert_close(
        (integers * scale[:, None]).double(), ((parts / step).round() * step).view(48, 5), rtol=1e-5, atol=1e-6
    )
    assert len(scale.unique()) == len(parts)


def test_a_last_group_has_fewer_rows():
    """Oracle: by hand. Three rows in two groups: two and one; a row of zeros stays zero."""
    integers, scale = group_round(torch.tensor([[6.0, -3.2], [12.0, 0.0], [0.0, 0.0]]), 3, 2)
    assert integers.tolist() == [[2, -1], [3, 0], [0, 0]]
    assert scale[0] == scale[1] == 4


def test_gradients_are_straight_through(generator):
    """Oracle: closed form. For L = sum(G * Y): dL/dW = G^T read(X), dL/dX = G W_hat, dL/db = sum(G)."""
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    learner, g = Learner(layer, 3, 2), torch.randn(7, 5, generator=generator)
    x = torch.randn(7, 12, generator=generator, requires_grad=True)
    output = learner(x)
    torch.autograd.backward((output * g).sum())
    held = learner.held(torch.float32)
    assert_close(output.detach(), held.multiply(x.detach(), layer.bias.detach()))
    assert_close(learner.weight.grad, g.T @ held.read(x.detach()))
    assert_close(x.grad, g @ held.dense())
    assert_close(learner.bias.grad, g.sum(dim=0))
    assert not torch.allclose(x.grad, g @ layer.weight)  # negative control: the rounded weight, not the original


def test_without_distillation_weights_are_rounded(build, architecture):
    """Oracle: the definition, on every layer; 4 bits in the feed-forward and 8 in attention, and no data asked for."""
    model = build()
    small = ZeroQuant(steps=0, groups=4)(model)
    for block in anatomy(model).blocks:
        for name in block.linear:
            weight, held = weight_of(model.get_submodule(name)), small.get_submodule(name).compressed
            bits = 8 if name in (block.q, block.k, block.v, block.o) else 4
            integers, scale = group_round(weight, bits, 4)
            assert_close(held.dense(), integers * scale[:, None])
            assert held.nbytes == weight.numel() * bits // 8 + 4 * len(weight)
            assert (held.bits, held.input_bits, held.input_scope) == (bits, 8, "token")
    replaced = [m for m in small.modules() if isinstance(m, CompressedLinear)]
    assert len(replaced) == 4 * len(anatomy(model).blocks[0].linear)


def test_the_first_step_is_adams(tokens):
    """Oracle: Adam's first step moves a parameter by the learning rate against its gradient's sign; seen in a norm's weight."""
    from tests.compression.conftest import decoder

    model = decoder()
    small = ZeroQuant(steps=1, learning_rate=1e-3)(model, [tokens])
    for before, after in zip(model.layers, small.layers, strict=True):
        moved = (after.attention_norm.weight - before.attention_norm.weight).abs()
        assert_close(moved, torch.full_like(moved, 1e-3), rtol=2e-3, atol=0)  # epsilon, beside small gradients
    assert torch.equal(small.norm.weight, model.norm.weight)  # stands outside of the blocks


def test_the_loss_is_the_mean_squared_error(tokens):
    """Oracle: three steps of Adam written out, towards the original block's output; by absolute errors it is another result."""
    from tests.compression.conftest import decoder

    model = decoder()
    with torch.no_grad():
        x, y, args, kwargs = next(block_inputs(decoder(), "layers", [tokens]))[0]
    found = ZeroQuant(steps=3, learning_rate=1e-2)(model, [tokens]).layers[0].attention_norm.weight
    for loss, same in ((nn.MSELoss(), True), (nn.L1Loss(), False)):
        student = copy.deepcopy(model.layers[0])
        for part, bits in ((student.attention, 8), (student.feed_forward, 4)):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Learner(layer, bits, 64))
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward(loss(student(x, *args, **kwargs), y))
            optimizer.step()
        assert torch.allclose(found, student.attention_norm.weight, rtol=1e-4) == same


def block_errors(model, small, block_list, tokens):
    """Mean squared error of each block's output, given the original model's input."""
    with torch.no_grad():
        for block, given in zip(
            small.get_submodule(block_list), block_inputs(model, block_list, [tokens]), strict=True
        ):
            x, y, args, kwargs = given[0]
            out = block(x, *args, **kwargs)
            yield float(((out if isinstance(out, torch.Tensor) else out[0]) - y).square().mean())


def test_distillation_brings_each_block_nearer_to_its_original(build, block_list, tokens, architecture):
    """Oracle: the original blocks' outputs on the data that was learned from; a step of nothing brings nothing."""
    model = build()
    errors = [
        list(block_errors(model, ZeroQuant(steps=n, learning_rate=r)(model, [tokens]), block_list, tokens))
        for n, r in ((0, 1e-3), (8, 1e-3), (1, 1e-12))
    ]
    assert all(after < 0.95 * before for before, after in zip(errors[0], errors[1], strict=True))
    assert_close(torch.tensor(errors[2]), torch.tensor(errors[0]), rtol=1e-3, atol=0)


def test_batches_are_taken_in_turn(tokens):
    """Oracle: the same steps with the batches written out; one batch twice is another result."""
    from tests.compression.conftest import decoder

    first, second = tokens[:2], tokens[2:]
    three = [
        ZeroQuant(steps=3, learning_rate=1e-2)(decoder(), batches).layers[0].attention_norm.weight
        for batches in ([first, second], [first, second, first], [first, first, second])
    ]
    assert torch.equal(three[0], three[1])
    assert not torch.equal(three[0], three[2])


def test_half_precision_is_kept(build, tokens, logits, architecture):
    """Oracle: dtypes of the model before; distillation runs in float32, and its result is near the model."""
    model = build().bfloat16()
    small = ZeroQuant(steps=2, bits=8)(model, [tokens])
    assert all(a.dtype == torch.bfloat16 for a in small.parameters())
    assert {m.compressed.dense().dtype for m in small.modules() if isinstance(m, CompressedLinear)} == {torch.bfloat16}
    exact = logits(model, tokens).float()
    assert (logits(small, tokens).float() - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 must be 2 to 8"),
        ({"attention_bits": 9}, "attention_bits=9 must be 2 to 8"),
        ({"groups": 0}, "groups=0 must be at least 1"),
        ({"steps": -1}, r"steps=-1 must be 0 \(no distillation\) or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ZeroQuant(**change)


def test_bad_calibration_is_refused(tokens):
    from tests.compression.conftest import decoder

    with pytest.raises(ValueError, match=r"steps=100 of distillation need texts: pass `calibration`, or steps=0"):
        ZeroQuant()(decoder())
    with pytest.raises(ValueError, match="must be a list of batches"):
        ZeroQuant()(decoder(), tokens)
    model = decoder()
    nn.init.constant_(model.layers[1].feed_forward_norm.weight, float("inf"))
    with pytest.raises(ValueError, match=r"makes NaN or infinity in the output of block 'layers\.1'"):
        ZeroQuant(steps=1)(model, [tokens])


@cache
def trained():
    """A small model that predicts its text better than chance, the text, and one of random tokens; trained in seconds."""
    generator = torch.Generator().manual_seed(0)
    table = (
        torch.randn(16, 16, 16, generator=generator).argmax(-1).tolist()
    )  # what follows two tokens, four times in five
    text = [0, 0]
    for drawn in torch.randint(0, 20, (7000,), generator=generator).tolist():
        text.append(drawn if drawn < 4 else table[text[-2]][text[-1]])
    tokens = torch.tensor(text)
    shape = {"vocabulary": 16, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(n_layers=3, **shape)), generator, std=0.1)
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), windows(tokens[:3000], 8, 32, generator), steps=120)
    return model.eval(), tokens, torch.randint(0, 16, (3000,), generator=generator)


def left(text):
    """Share of the perplexity lost by rounding that is left with distillation on a text, at 1/50 of the training's rate.

    Weights have 3 bits: at W4/8 this small model loses little, and what it loses scatters by as much.
    """
    model, tokens, noise = trained()
    batches = list(torch.split({"own": tokens, "random": noise}[text][:2560].view(-1, 32), 16))
    held_out, method = tokens[3000:], {"bits": 3, "attention_bits": 3, "groups": 4}
    plain = ZeroQuant(steps=0, **method)(model)
    distilled = ZeroQuant(learning_rate=1e-4, **method)(model, batches)
    best, before, after = (perplexity(m, held_out, 32) for m in (copy.deepcopy(model), plain, distilled))
    assert before > 1.1 * best
    return (after - best) / (before - best)


def test_claim_distillation_repairs(claim):
    """Perplexity lost at W3A8 that is still lost after LKD on text like the training text; a model trained for seconds."""
    claim("zeroquant", "distillation-repairs", left("own"))


def test_claim_distillation_repairs_four_bits(claim, generator):
    """The same in the paper's own setting, W4/8, where the testbed's model loses more than rounding scatters by; 20 steps a block."""
    subject = testbed.subject()
    text, held_out = subject.text("train", 50_000), subject.text("held-out", 8192)
    starts = torch.randint(len(text) - 128, (16, 1), generator=generator)
    calibration = list(torch.split(text[starts + torch.arange(128)], 4))
    best, before, after = (
        perplexity(model, held_out, 128)
        for model in (
            subject.model,
            ZeroQuant(steps=0)(subject.model),
            ZeroQuant(steps=20, learning_rate=1e-4)(subject.model, calibration),
        )
    )
    assert before > 1.05 * best
    claim("zeroquant", "distillation-repairs-four-bits", (after - best) / (before - best))


def test_claim_random_data_suffices(claim):
    """The same after LKD on random tokens."""
    claim("zeroquant", "random-data-helps", left("random"))


def test_claim_tokens_differ(claim, tokens):
    """Error of a grid for each token over that of one static grid for all, 8 bits, on the inputs of a down projection."""
    from refimpl.compression.quantization.activations import Activations

    model, text, _ = trained()
    seen = []
    hook = model.layers[0].feed_forward.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(text[:512].view(-1, 32))
    hook.remove()
    x = seen[0].flatten(0, 1)
    whole = Activations(scope="static")
    grids = (None, whole.grid(x.amin(), x.amax()))
    errors = [
        float((codes * scale - x).norm())
        for a, g in zip((Activations(), whole), grids, strict=True)
        for codes, scale in [a.quantize(x, g)]
    ]
    claim("zeroquant", "token-wise", errors[0] / errors[1])
