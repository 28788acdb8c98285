"""OmniQuant: round-to-nearest without training, Adam's first step, streams of quantized blocks, and what learning is worth."""

import dataclasses
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs, hidden_states
from refimpl.compression.blocks import keep_blocks
from refimpl.compression.protocol import CompressedLinear, compress
from refimpl.compression.quantization.affine import affine_grid, dequantize, quantize
from refimpl.compression.quantization.weight_activation.smoothquant import SmoothQuant
from refimpl.compression.quantization.weight_only.omniquant import OmniQuant
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.config import Config
from refimpl.model.linear import weight_of
from refimpl.model.model import Decoder, initialize_
from tests.compression.conftest import ARCHITECTURES, decoder, opt
from tests.compression.quantization.weight_activation.test_outlier_suppression_plus import losses, off, plant


@pytest.fixture
def build(architecture, block_list):
    """Builds a model of two blocks: the second learns behind one that is quantized."""
    return lambda: shortened(ARCHITECTURES[architecture](), block_list, 2)


def shortened(model, block_list="layers", blocks=1):
    keep_blocks(model, block_list, range(blocks))
    return model


@pytest.mark.parametrize("bits", [2, 4])
def test_without_training_weights_are_rounded_on_narrower_ranges(build, bits):
    """Oracle: the affine grid of sigma(4) = 0.982 of each row's range, and RTN's bytes; no data is asked for."""
    model = build()
    small = OmniQuant(bits=bits, steps=0, transform_rate=None)(model)
    share = 1 / (1 + torch.e**-4)
    for name in anatomy(model).blocks[1].linear:
        weight, held = weight_of(model.get_submodule(name)), small.get_submodule(name).compressed
        low, high = share * weight.amin(1), share * weight.amax(1)
        scale, zero = affine_grid(low, high, bits, symmetric=False, scale_dtype=torch.float16)
        assert_close(held.dense(), dequantize(quantize(weight, scale, zero, bits), scale, zero))
        assert held.nbytes == RTN(bits=bits, granularity="channel")(weight).nbytes
    replaced = [module for module in small.modules() if isinstance(module, CompressedLinear)]
    assert len(replaced) == 2 * len(anatomy(model).blocks[0].linear)


def test_the_first_step_is_adams(tokens):
    """Oracle: Adam's first step moves a parameter by its learning rate against the gradient's sign; seen in the scales that norms
    took over, w / s, before and after.
    """
    scales = []
    for steps in (0, 1):
        small = OmniQuant(steps=steps, transform_rate=1e-3)(shortened(decoder()), [tokens])
        scales.append([1 / layer.attention_norm.weight for layer in small.layers])  # norms begin at 1
    assert_close(
        (scales[1][0] - scales[0][0]).abs(), torch.full((32,), 1e-3), rtol=2e-2, atol=0
    )  # epsilon, and float32


def test_scales_begin_by_the_rule_of_smoothquant(tokens):
    """Oracle: SmoothQuant's formula by hand, sqrt(max |X| / max |W|), with the three weights that read the norm."""
    model, seen = shortened(decoder()), []
    attention = model.layers[0].attention
    with torch.no_grad(), ExitStack() as hooks:
        hooks.enter_context(attention.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
        model(tokens)
    weights = torch.cat([layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)])
    expected = (seen[0].flatten(0, 1).abs().amax(dim=0) / weights.abs().amax(dim=0)).sqrt()
    assert_close(1 / OmniQuant(steps=0)(model, [tokens]).layers[0].attention_norm.weight, expected)


def test_scales_stay_positive(tokens):
    """Oracle: the official code's least scale, 0.01, which steps as long as the scales themselves would cross."""
    norm = OmniQuant(steps=2, transform_rate=5.0)(shortened(decoder()), [tokens]).layers[0].attention_norm
    assert_close((1 / norm.weight).min(), torch.tensor(0.01))


def test_what_is_transformed(tokens):
    """Oracle: the official code: two norms and the values are shifted where activations are rounded, and not for weights alone. Then
    queries and keys have no factor of their own."""
    made = []

    class Watching(OmniQuant):
        def _train(self, learned, given, streams):
            made.append([parameter.requires_grad for parameter in (*learned.transform.shifts, learned.transform.heads)])

    for bits in (None, 8):
        Watching(activation_bits=bits)(shortened(opt(), "model.decoder.layers"), [tokens])
    assert made == [[False] * 4, [True] * 4]


def test_blocks_learn_behind_quantized_blocks_towards_the_original(build, block_list, tokens):
    """Oracle: the quantized model's blocks run by hand for the inputs, the original's outputs for the targets."""
    seen = []

    class Watching(OmniQuant):
        def _train(self, learned, given, streams):
            seen.append((streams[0].clone(), given[0][1].clone()))

    model = build()
    small = Watching(bits=3, transform_rate=None)(model, [tokens])
    with torch.no_grad():
        blocks, stream = small.get_submodule(block_list), None
        for (x, y), block, given in zip(seen, blocks, block_inputs(model, block_list, [tokens]), strict=True):
            stream = given[0][0] if stream is None else stream
            assert_close(x, stream)
            assert_close(y, given[0][1])
            stream = hidden_states(block(stream, *given[0][2], **given[0][3]))
    assert not torch.allclose(seen[1][0], seen[0][1], atol=1e-2)  # negative control: not what the original makes


def test_learning_brings_the_first_block_nearer_to_its_original(build, block_list, tokens):
    """Oracle: the original block's output on the data that was learned from; a step of nearly nothing brings nearly nothing."""
    model, errors = shortened(build(), block_list), []
    method = OmniQuant(bits=3, activation_bits=5, clipping_rate=0.15, transform_rate=3e-2)
    changes = ({"steps": 0}, {"steps": 30}, {"steps": 1, "clipping_rate": 1e-9, "transform_rate": 1e-9})
    with torch.no_grad():
        x, y, args, kwargs = next(block_inputs(model, block_list, [tokens]))[0]
    for change in changes:
        small = dataclasses.replace(method, **change)(model, [tokens])
        with torch.no_grad():
            out = hidden_states(small.get_submodule(block_list)[0](x, *args, **kwargs))
        errors.append(float((out - y).square().mean()))
    assert errors[1] < 0.85 * errors[0]
    assert_close(errors[2], errors[0], rtol=1e-3, atol=0)


def test_batches_are_taken_in_turn(tokens):
    """Oracle: the same steps with the batches written out; one batch twice is another result."""
    first, second = tokens[:2], tokens[2:]
    three = [
        OmniQuant(steps=3, transform_rate=0.1)(shortened(decoder()), batches).layers[0].attention_norm.weight
        for batches in ([first, second], [first, second, first], [first, first, second])
    ]
    assert not torch.equal(three[0], three[2])
    # scales begin with extremes, which batches in any number of copies share
    assert torch.equal(three[0], three[1])


@pytest.mark.parametrize("group_size", [16, 24])
def test_groups_have_a_grid_each(group_size, tokens):
    """Oracle: counting: scales for each row, the last group shorter where the size does not divide."""
    small = OmniQuant(bits=2, steps=1, group_size=group_size)(shortened(decoder()), [tokens])
    held = small.layers[0].attention.q_proj.compressed
    assert held.scale.numel() == 32 * 2
    for row in held.dense():
        assert all(len(part.unique()) <= 4 for part in row.split(group_size))


def test_half_precision_is_kept(build, tokens, logits):
    """Oracle: dtypes of the model before; its result is near the float32 model."""
    small = OmniQuant(bits=8, activation_bits=8, steps=2)(build().bfloat16(), [tokens])
    assert all(parameter.dtype == torch.bfloat16 for parameter in small.parameters())
    assert {m.compressed.dense().dtype for m in small.modules() if isinstance(m, CompressedLinear)} == {torch.bfloat16}
    assert off(logits(small, tokens).float(), logits(build(), tokens)) < 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"activation_bits": 1}, "activation_bits=1 must be 2 to 8, or None"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
        ({"steps": -1}, r"steps=-1 must be 0 \(no training\) or more"),
        ({"clipping_rate": 0.0}, "clipping_rate=0.0 must be above 0"),
        ({"transform_rate": -1.0}, "transform_rate=-1.0 must be above 0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        OmniQuant(**change)


def test_bad_calibration_and_models_are_refused(tokens):
    with pytest.raises(ValueError, match="OmniQuant needs texts to learn from: pass `calibration`"):
        OmniQuant(steps=0)(decoder())
    with pytest.raises(ValueError, match="must be a list of batches"):
        OmniQuant()(decoder(), tokens)
    model = decoder()
    nn.init.constant_(model.layers[1].feed_forward_norm.weight, float("inf"))
    with pytest.raises(ValueError, match=r"makes NaN or infinity in the output of block 'layers\.1'"):
        OmniQuant(steps=1, transform_rate=None)(model, [tokens])
    with pytest.raises(ValueError, match="must be a linear layer that nothing has compressed"):
        OmniQuant(steps=0)(OmniQuant(steps=0, transform_rate=None)(opt()), [tokens])


@pytest.fixture(scope="module")
def wide():
    """A decoder of one block with rows of 96 to 160 weights, two batches of random tokens, and a text with its exact logits."""
    sizes = {"vocabulary": 61, "d_model": 96, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, "d_ff": 160}
    generator = torch.Generator().manual_seed(0)
    model = initialize_(Decoder(Config(**sizes)), generator, std=0.04).eval()
    texts = torch.randint(0, 61, (2, 16, 32), generator=generator)
    with torch.no_grad():
        return model, list(texts[0].split(8)), texts[1], model(texts[1])


@pytest.mark.parametrize("bits", [2, 3])
def test_claim_beats_rtn(bits, claim, wide, logits):
    """Error of the logits on other text, weights alone, clipping learned in 60 steps at five times the rate, over that of RTN."""
    model, calibration, text, exact = wide
    method = OmniQuant(bits=bits, steps=60, clipping_rate=5e-2, transform_rate=None)
    ours = off(logits(method(model, calibration), text), exact)
    claim(
        "omniquant",
        f"beats-rtn-at-{bits}-bits",
        ours / off(logits(compress(model, RTN(bits=bits, granularity="channel")), text), exact),
    )


@pytest.fixture(scope="module")
def error():
    """`error(method)`: of the logits on random tokens, of two blocks of an OPT with planted outliers; each computed once."""
    texts = torch.randint(0, 61, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    model = shortened(plant(opt()), "model.decoder.layers", 2)
    return cache(lambda method: losses(model, method, list(texts[0].split(8)), texts[1]))


OURS = OmniQuant(bits=6, activation_bits=6, steps=60)


def test_claim_beats_smoothquant(claim, error):
    """Error of the logits at W6A6 after 60 steps, over that of SmoothQuant with the same grids; planted outliers."""
    claim("omniquant", "beats-smoothquant", error(OURS) / error(SmoothQuant(bits=6, level="O1", granularity="channel")))


def test_claim_both_parts_matter(claim, error):
    """Error of the logits at W6A6 after 60 steps, over that with clipping alone; planted outliers."""
    claim("omniquant", "transform-matters", error(OURS) / error(dataclasses.replace(OURS, transform_rate=None)))


def test_claim_learning_matters(claim, error):
    """Error of the logits at W6A6 after 60 steps, over that where nothing has been learned; planted outliers."""
    claim("omniquant", "learning-matters", error(OURS) / error(dataclasses.replace(OURS, steps=0)))
