"""AWQ: scaling changes no output, scales and limits are those of a brute-force search, in whole models and layers alone."""

import copy
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.blocks import find_blocks, keep_blocks
from refimpl.compression.protocol import CompressedLinear, compress
from refimpl.compression.quantization.activation_aware import ScaledWeight, clipped, factors, on_grids
from refimpl.compression.quantization.weight_only.awq import AWQ
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.linear import weight_of
from tests.compression.conftest import ARCHITECTURES


@pytest.fixture
def build(architecture, block_list):
    """Builds a model of two blocks: what a block is given comes from one that has been compressed."""

    def short():
        model = ARCHITECTURES[architecture]()
        keep_blocks(model, block_list, [0, 1])
        return model

    return short


def off(one, other):
    return float((one - other).norm() / other.norm())


def plant(model, factor=20.0, every=8):
    """Make every eighth channel of each norm's output larger, and what reads it smaller; the same function."""
    for block in anatomy(model).blocks:
        for feed in feeds(model, block):
            if feed.producer in (block.attention_norm, block.feed_forward_norm):
                scale = torch.ones(len(feed.source))
                scale[1::every] = 1 / factor
                rescale_(model, feed, scale)
    return model


def seen_by(model, path, tokens):
    """Inputs of a layer on some text, `[n, in]`, and the output of the module around it."""
    seen, made = [], []
    around = model.get_submodule(path.rpartition(".")[0])
    with ExitStack() as hooks:
        hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
        hooks.enter_context(around.register_forward_hook(lambda _m, _a, out: made.append(out)))
        with torch.no_grad():
            model(tokens)
    made = made[0] if isinstance(made[0], torch.Tensor) else made[0][0]
    return seen[0].flatten(0, -2), made


def scaled_only(model, tokens, method):
    """A model with scaled weights, in which nothing is rounded; factors without an absorber divide by hooks."""
    model = copy.deepcopy(model)
    name, _ = find_blocks(model)
    found = {}
    with torch.no_grad():
        for i, (part, given) in enumerate(zip(anatomy(model).blocks, block_inputs(model, name, [tokens]), strict=True)):
            inputs, divided = method.scale_block_(model, part, f"{name}.{i}", given)
            found |= inputs
            for path, factor in divided.items():
                layer = model.get_submodule(path)
                layer.register_forward_pre_hook(lambda _m, args, factor=factor: (args[0] / factor.to(args[0].dtype),))
    return model, found


def test_scaling_changes_no_output(build, tokens, logits, generator):
    """Oracle: the logits before, in float64; the inputs that it tells are those of the scaled layers; weights did change."""
    model = plant(build()).double()
    with torch.no_grad():  # biases are 0 where models begin, which would hide them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator).double())
    scaled, inputs = scaled_only(model, tokens, AWQ(bits=2, group_size=16))
    assert_close(logits(scaled, tokens), logits(model, tokens), rtol=1e-10, atol=1e-10)
    for path in anatomy(model).blocks[1].linear:
        x, _ = seen_by(scaled, path, tokens)
        assert_close(inputs[path].double(), x, rtol=1e-5, atol=1e-5)  # told in float32
    layer = anatomy(model).blocks[0].q
    assert off(weight_of(scaled.get_submodule(layer)), weight_of(model.get_submodule(layer))) > 0.1  # negative control


@pytest.mark.parametrize("architecture", ["decoder", "gpt2"])
def test_shared_factors_by_brute_force(build, tokens):
    """Oracle: for each of 20 exponents the whole model is run with the attention's weights replaced by Q(W s) / s, and its output is
    compared; the layers end as W times the best s, all with the same."""
    model = plant(build())
    part = anatomy(model).blocks[1]
    paths = list(dict.fromkeys((part.q, part.k, part.v)))
    x, exact = seen_by(model, paths[0], tokens)
    errors = {}
    for i in range(20):
        tried, s = copy.deepcopy(model), factors(x.abs().mean(dim=0), i / 20)
        for path in paths:
            weight = weight_of(tried.get_submodule(path))
            weight.copy_(RTN(bits=2, group_size=16)(weight * s).dense() / s)
        errors[i] = float((seen_by(tried, paths[0], tokens)[1] - exact).square().sum())
    best = min(errors, key=errors.get)
    assert best > 0 and errors[best] < 0.9 * errors[0]  # negative control
    s = factors(x.abs().mean(dim=0), best / 20)
    scaled, _ = scaled_only(model, tokens, AWQ(bits=2, group_size=16))
    for path in (part.q, part.k) if len(paths) > 1 else ():
        assert_close(weight_of(scaled.get_submodule(path)), weight_of(model.get_submodule(path)) * s)
    norms = [m.get_submodule(part.attention_norm).weight for m in (scaled, model)]
    assert_close(norms[0], norms[1] / s)


def test_rounded_and_clipped_as_they_should(build, tokens, architecture):
    """Oracle: round-to-nearest of the scaled weights, for queries and keys; others lie within narrower ranges, and err less on the
    output of what they see. The last layer of GPT-2 divides its inputs. No linear layer of a block is left."""
    model, method = build(), AWQ(bits=2, group_size=16)
    small = method(model, [tokens[:2], tokens[2:]])
    scaled, inputs = scaled_only(model, tokens, method)
    clips = 0
    for block in anatomy(model).blocks:
        for path in block.linear:
            layer, weight = small.get_submodule(path), weight_of(scaled.get_submodule(path))
            assert isinstance(layer, CompressedLinear)
            held = layer.compressed
            assert isinstance(held, ScaledWeight) == (architecture == "gpt2" and path == block.down)
            held = held.low if isinstance(held, ScaledWeight) else held
            plain = RTN(bits=2, group_size=16)(weight)
            if path in (block.q, block.k):
                assert_close(held.dense(), plain.dense(), rtol=1e-4, atol=1e-5)
                continue
            ours, theirs = (
                ((dense - weight) @ inputs[path].T).square().sum() for dense in (held.dense(), plain.dense())
            )
            clips += int(not torch.equal(held.dense(), plain.dense()))
            assert (held.scale.float() <= plain.scale.float() * 1.01).all()
            assert ours <= theirs * 1.5  # groups are judged one by one, their errors may add up
    assert clips > 4  # negative control


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_without_both_searches_it_is_round_to_nearest(build, tokens, logits):
    """Oracle: RTN."""
    model = build()
    ours = AWQ(bits=3, group_size=16, scale=False, clip=False)(model, [tokens])
    theirs = compress(model, RTN(bits=3, group_size=16), skip=["lm_head", "*project_*"])
    assert torch.equal(logits(ours, tokens), logits(theirs, tokens))
    assert not torch.equal(logits(AWQ(bits=3, group_size=16)(model, [tokens]), tokens), logits(ours, tokens))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_and_keyword_batches(build, tokens, logits, architecture):
    """Oracle: the float32 result, in the precision of bfloat16 and 8 bits."""
    key = "tokens" if architecture == "decoder" else "input_ids"
    small = AWQ(bits=8)(build().bfloat16(), [{key: tokens}])
    assert logits(small, tokens).dtype == torch.bfloat16
    assert off(logits(small, tokens).float(), logits(AWQ(bits=8)(build(), [tokens]), tokens)) < 0.15


def test_a_layer_alone(generator, tmp_path):
    """Oracle: the search over exponents by hand, then `RTN`; multiplying is the product with dense; bytes by arithmetic; its state
    is saved and loaded."""
    weight, inputs = torch.randn(6, 20, generator=generator), torch.randn(30, 20, generator=generator)
    inputs[:, 4] *= 30
    held = AWQ(bits=3, group_size=8, clip=False).layer(weight, inputs)
    errors = []
    for i in range(20):
        s = factors(inputs.abs().mean(dim=0), i / 20)
        errors.append(float((inputs @ (on_grids(weight * s, 3, 8, torch.float16) / s - weight).T).square().sum()))
    s = factors(inputs.abs().mean(dim=0), errors.index(min(errors)) / 20).half()
    assert torch.equal(held.factor, s) and errors.index(min(errors)) > 0
    assert_close(held.dense(), RTN(bits=3, group_size=8)(weight * s).dense() / s)
    assert_close(held.multiply(inputs), inputs @ held.dense().T, rtol=1e-4, atol=1e-3)  # outputs of size 100
    assert held.nbytes == 120 * 3 / 8 + 18 * 2 + 9 + 20 * 2  # codes, 18 scales, as many zero points, 20 factors
    save_file(held.state_dict(), tmp_path / "layer.safetensors")
    other = AWQ(bits=3, group_size=8).layer(weight + 1, inputs)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.dense(), held.dense())


def test_limits_are_judged_on_the_inputs_of_the_scaled_layer(generator):
    """Oracle: `RTN` of the scaled weight, clamped to limits that inputs divided by the factors choose; others choose others."""
    weight = torch.randn(6, 20, generator=generator)
    inputs = torch.randn(30, 20, generator=generator) * torch.randn(20, generator=generator).mul(2).exp()
    held = AWQ(bits=2, group_size=8).layer(weight, inputs)
    s, plain = held.factor.float(), RTN(bits=2, group_size=8)
    divided, undivided = (plain(clipped(weight * s, x, 2, 8)).dense() for x in (inputs / s, inputs))
    assert_close(held.low.dense(), divided)
    assert not torch.allclose(undivided, divided)  # negative control


@pytest.mark.parametrize(("out", "columns"), [(1, 33), (5, 1), (3, 129)])
def test_layers_of_odd_sizes_and_dead_inputs(out, columns, generator):
    """Oracle: round-to-nearest, which no layer errs more than; where nothing is seen, it is that."""
    weight, inputs = torch.randn(out, columns, generator=generator), torch.randn(9, columns, generator=generator)
    before = weight.clone(), inputs.clone()
    held, plain = AWQ(group_size=32).layer(weight, inputs), RTN(group_size=32)(weight)
    assert (inputs @ (held.dense() - weight).T).norm() <= (inputs @ (plain.dense() - weight).T).norm() * 1.2
    assert torch.equal(weight, before[0]) and torch.equal(inputs, before[1])
    assert_close(AWQ(group_size=32).layer(weight, 0 * inputs).dense(), plain.dense())
    assert AWQ(group_size=None).layer(weight.bfloat16(), inputs.bfloat16()).dense().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        AWQ(**change)


def test_what_is_wrong_is_refused(tokens):
    model = ARCHITECTURES["decoder"]()
    with pytest.raises(ValueError, match=r"AWQ needs texts to see .*: pass `calibration`"):
        AWQ()(model)
    with pytest.raises(ValueError, match="must be a list of batches"):
        AWQ()(model, tokens)
    with pytest.raises(ValueError, match="no blocks"):
        AWQ()(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="is a CompressedLinear and must be a linear layer"):
        AWQ()(AWQ(bits=8)(model, [tokens]), [tokens])
    with pytest.raises(ValueError, match="AWQ needs the layer's inputs"):
        AWQ().layer(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"use scale_dtype=torch\.float32"):
        AWQ(bits=1).layer(torch.full((1, 3), 1e8), torch.ones(5, 3))
    nn.init.constant_(model.layers[0].attention.o_proj.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the weight of layer 'layers\.0\.attention\.o_proj' holds NaN"):
        AWQ()(model, [tokens])
    nn.init.constant_(model.embedding.weight, float("inf"))
    with pytest.raises(ValueError, match=r"NaN or infinity in the inputs of layer 'layers\.0\.attention\.q_proj'"):
        AWQ()(model, [tokens])


def error(weight, dense, inputs):
    return float((inputs @ (dense - weight).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_claim_beats_rtn(bits, claim, generator):
    """Output error in groups of 128, over that of round-to-nearest, on the arena's layer."""
    weight, inputs = substrate(generator)
    ours, plain = AWQ(bits=bits).layer(weight, inputs).dense(), RTN(bits=bits)(weight).dense()
    claim("awq", f"beats-rtn-at-{bits}-bits", error(weight, ours, inputs) / error(weight, plain, inputs))


def test_claim_beats_rtn_on_a_model(claim, logits, generator):
    """Error of the logits at 3 bits in groups of 16, over that of round-to-nearest; outliers 20 times larger, planted; other tokens."""
    model = plant(ARCHITECTURES["decoder"]())
    calibration, text = torch.randint(0, 61, (2, 8, 32), generator=generator)
    ours = AWQ(bits=3, group_size=16)(model, [calibration])
    plain = compress(model, RTN(bits=3, group_size=16))
    errors = [off(logits(m, text), logits(model, text)) for m in (ours, plain)]
    claim("awq", "beats-rtn-on-a-model", errors[0] / errors[1])


def test_claim_hardly_overfits(claim, generator):
    """Output error on 1,024 tokens at 3 bits, calibrated on 32 of them less calibrated on all; over GPTQ's; on the arena's layer."""
    weight, inputs = substrate(generator)
    growth = []
    for method in (AWQ(bits=3).layer, GPTQ(bits=3)):
        few, all_of_them = (error(weight, method(weight, inputs[:n]).dense(), inputs) for n in (32, 1024))
        growth.append(few - all_of_them)
    claim("awq", "hardly-overfits", growth[0] / growth[1])


def test_claim_activations_tell(claim, generator):
    """Output error of 3-bit round-to-nearest with the 1 % of channels kept that see the largest inputs, over that with those of the
    largest weights kept; on the arena's layer."""
    weight, inputs = substrate(generator)
    errors = []
    for salience in (inputs.abs().mean(dim=0), weight.abs().mean(dim=0)):
        kept = salience.topk(round(0.01 * weight.shape[1])).indices
        dense = RTN(bits=3)(weight).dense()
        dense[:, kept] = weight[:, kept]
        errors.append(error(weight, dense, inputs))
    claim("awq", "activations-tell", errors[0] / errors[1])
