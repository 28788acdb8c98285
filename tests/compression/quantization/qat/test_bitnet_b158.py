"""BitNet b1.58: the layer by its formulas, gradients by those of the norm, and where norms go."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.qat.bitnet_b158 import BitLinear, BitNet
from refimpl.compression.quantization.qat.ternary import absmean
from refimpl.model.model import Decoder, RMSNorm, initialize_
from refimpl.model.train import perplexity, train, windows
from tests.compression.conftest import decoder, gpt2, llama, opt
from tests.compression.quantization.qat.conftest import BATCH, CONFIG, LENGTH


def official(x, w, g, eps):
    """The layer as the authors' FAQ defines it, in float64: norm, both quantizations, product; and what it multiplies."""
    x, w, g = x.double(), w.double(), g.double()
    normed = g * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    scale = 127 / normed.abs().amax(-1, keepdim=True)
    x_q = (normed * scale).round().clamp(-128, 127) / scale
    gamma = w.abs().mean()
    w_q = (w / gamma).round().clamp(-1, 1) * gamma
    return x_q @ w_q.T, normed, x_q, w_q


def test_layer_by_the_formulas(generator):
    """Oracle: norm, absmax and absmean written out in float64; straight through, the gradient of W is that of the product for
    the rounded inputs, and that of the inputs goes through the norm for the rounded weight."""
    layer = BitLinear(nn.Linear(20, 6), None, 1e-6)
    layer.weight.data.normal_(generator=generator)
    layer.norm.data.uniform_(0.5, 2, generator=generator)
    x, upstream = torch.randn(7, 20, generator=generator, requires_grad=True), torch.randn(7, 6, generator=generator)
    (layer(x) * upstream).sum().backward()
    expected, _, x_q, w_q = official(x.detach(), layer.weight.detach(), layer.norm.detach(), 1e-6)
    assert layer.bias is None
    assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(layer.weight.grad.double(), upstream.double().T @ x_q, rtol=1e-5, atol=1e-5)
    plain, g = x.detach().double().requires_grad_(), layer.norm.detach().double().requires_grad_()
    normed = g * plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    ((normed @ w_q.T) * upstream.double()).sum().backward()
    assert_close(x.grad.double(), plain.grad, rtol=1e-4, atol=1e-4)
    assert_close(layer.norm.grad.double(), g.grad, rtol=1e-4, atol=1e-4)


def test_norms_move_into_the_layers_that_read_them():
    """Oracle: the source's two steps. Before attention and feed-forward there is none any more; each layer has one, with the
    factors and eps of the one that went, or 1."""
    model = decoder()
    for block in model.layers:
        block.attention_norm.weight.data.uniform_(0.5, 2)
        block.attention_norm.eps = 0.01
    student = BitNet(eps=0.02).prepare(model)
    for before, after in zip(model.layers, student.layers, strict=True):
        assert isinstance(after.attention_norm, nn.Identity) and isinstance(after.feed_forward_norm, nn.Identity)
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(after.attention, name).norm, before.attention_norm.weight)
            assert getattr(after.attention, name).eps == 0.01
        for new in (after.attention.o_proj, after.feed_forward.down_proj):
            assert (new.norm == 1).all() and new.eps == 0.02
    assert isinstance(student.norm, RMSNorm) and isinstance(student.lm_head, nn.Linear)


def test_without_rounding_only_the_new_norms_would_change_the_model(monkeypatch, tokens, logits):
    """Oracle: the model with two more norms in each block, by hooks; rounding replaced by nothing."""
    model = decoder()
    for block in model.layers:
        block.attention_norm.weight.data.uniform_(0.5, 2)
    student = BitNet().prepare(model)
    monkeypatch.setattr("refimpl.compression.quantization.qat.bitnet_b158.straight_through", lambda x, rounded: x)
    for block in model.layers:
        for layer in (block.attention.o_proj, block.feed_forward.down_proj):
            layer.register_forward_pre_hook(
                lambda _, args: (torch.nn.functional.rms_norm(args[0], args[0].shape[-1:], eps=1e-6),)
            )
    assert_close(logits(student, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [decoder, llama, opt, gpt2])
def test_no_biases_and_only_layers_of_blocks(build):
    """Oracle: the source: attention and feed-forward, no bias; OPT's projections around its blocks stay."""
    student = BitNet().prepare(build())
    layers = {name: m for name, m in student.named_modules() if isinstance(m, BitLinear)}
    assert len(layers) == 4 * {"decoder": 7, "llama": 7, "opt": 6, "gpt2": 4}[build.__name__]
    assert all(layer.bias is None for layer in layers.values())
    assert all(".layers." in f".{name}" or ".h." in name for name in layers)


def test_a_norm_with_another_reader_is_refused():
    with pytest.raises(
        ValueError, match=r"\['layers\.0\.attention\.q_proj'\] are taken, and 'layers\.0\.attention_norm'"
    ):
        BitNet().prepare(decoder(), target=["*.q_proj"])
    with pytest.raises(ValueError, match="stands in a block's attention or feed-forward"):
        BitNet().prepare(opt(), target=["*project*"])
    with pytest.raises(ValueError, match="no blocks"):
        BitNet().prepare(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_configuration_is_checked(eps):
    with pytest.raises(ValueError, match=r"eps=.* must be 0 or more"):
        BitNet(eps=eps)


STEPS = 80


def from_nothing(trained, method=None):
    """A small language model trained from its first step, through ternary weights or in full precision."""
    model = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(3), std=0.1)
    model = method.prepare(model) if method else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0, fused=True)
    batches = windows(trained.text, BATCH, LENGTH, torch.Generator().manual_seed(1))
    train(model, optimizer, batches, STEPS, schedule=lambda progress: 1 - progress)
    return model


@pytest.fixture(scope="module")
def ternary(trained):
    """A model trained and converted by the method."""
    return BitNet().convert(from_nothing(trained, BitNet()))


def test_claim_near_full_precision_and_better_than_rounding(trained, ternary, claim):
    """Perplexity over that of the same model in full precision after as many steps, and over that of this one with its weights made
    ternary, and nothing else of it changed.
    """
    floating = from_nothing(trained)
    rounded = copy.deepcopy(floating)
    for layer in [module for module in rounded.layers.modules() if isinstance(module, nn.Linear)]:
        codes, scale = absmean(layer.weight.detach())
        layer.weight.data.copy_(codes * scale)
    ours, full, after = (perplexity(m, trained.unseen, LENGTH, batch=64) for m in (ternary, floating, rounded))
    claim("bitnet-b158", "near-full-precision", ours / full)
    claim("bitnet-b158", "beats-rounding-afterwards", ours / after)


def test_claim_values(ternary, claim):
    """Share of zeros among all ternary weights after training, and bits held for a weight of a layer 512 wide, scale included."""
    layers = [m.compressed for m in ternary.modules() if isinstance(m, CompressedLinear)]
    claim(
        "bitnet-b158",
        "three-values-alike",
        torch.cat([(layer.dense() == 0).flatten() for layer in layers]).float().mean(),
    )
    wide = BitLinear(nn.Linear(512, 256), None, 1e-6).held()
    claim("bitnet-b158", "bits-per-weight", 8 * (wide.codes.nbytes + wide.scale.nbytes) / (512 * 256))
    assert math.isclose(wide.nbytes, 256 * 103 + 4 + 512 * 4)
