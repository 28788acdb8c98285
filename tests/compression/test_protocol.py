"""What every compression method must satisfy, and the driver that takes a layer method over a model.

A method joins by being implemented below `compression/`; its call says whether it takes a layer's weight or a whole model, and
what is meant for the other kind skips it.
"""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.compression.blocks import find_blocks
from refimpl.compression.folder import load_compressed, save_compressed
from refimpl.compression.protocol import (
    CompressedLinear,
    CompressedWeight,
    apply,
    check_layer,
    compress,
    decompress,
    takes_layers,
)
from refimpl.compression.quantization.weight_only.awq import AWQ
from refimpl.compression.quantization.weight_only.llm_int8 import LLMInt8
from refimpl.compression.quantization.weight_only.omniquant import OmniQuant
from refimpl.model.model import Attention, Block
from tests.compression.conftest import decoder_with_biases, differences, llama, with_a_plainer_module

METHODS = [
    method
    for method in taxonomy.load().find(category="compression", implemented=True)
    if not method.category.startswith(("compression/distillation", "compression/quantization/qat"))  # these train
]


def default(entry):
    """A method in its default configuration; two steps are enough for one that trains to keep the invariants or not."""
    method = entry.load()()
    return dataclasses.replace(method, steps=2) if hasattr(method, "steps") else method


@pytest.fixture(params=METHODS, ids=lambda m: m.id)
def method(request):
    """A layer method of the family in its default configuration."""
    implementation = default(request.param)
    if not takes_layers(implementation):
        pytest.skip("takes a whole model, not a layer's weight")
    return implementation


@pytest.fixture(params=METHODS, ids=lambda m: m.id)
def model_method(request):
    """A model method of the family in its default configuration."""
    implementation = default(request.param)
    if takes_layers(implementation):
        pytest.skip("takes a layer's weight, not a whole model")
    return implementation


def test_there_are_methods_of_both_kinds():
    kinds = [takes_layers(default(entry)) for entry in METHODS]
    assert True in kinds and False in kinds


def layer(generator, out=6, columns=20, rows=40):
    return torch.randn(out, columns, generator=generator), torch.randn(rows, columns, generator=generator)


def test_inputs_are_not_written(method, generator):
    weight, inputs = layer(generator)
    before = weight.clone(), inputs.clone()
    method(weight, inputs)
    assert torch.equal(weight, before[0])
    assert torch.equal(inputs, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_near_the_weight_in_shape_dtype_and_value(method, dtype, generator):
    """Oracle: the weight itself. Doing nothing would give 0, forgetting the weight 1."""
    weight, inputs = layer(generator)
    dense = method(weight.to(dtype), inputs.to(dtype)).dense()
    assert dense.shape == weight.shape
    assert dense.dtype == dtype
    assert 0 < (dense.float() - weight).norm() / weight.norm() < 0.9


def test_the_same_call_gives_the_same_result(method, generator):
    """Also after another layer has been compressed in between: nothing is left over."""
    weight, inputs = layer(generator)
    first = method(weight, inputs).dense()
    method(*layer(generator, out=3, columns=7))
    assert torch.equal(method(weight, inputs).dense(), first)


def test_bytes_claimed_are_bytes_held(method, generator):
    """Oracle: the size of the storage of every tensor that the object holds, found by walking over it."""
    compressed = method(*layer(generator))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(compressed)}
    assert compressed.nbytes == sum(held.values())


def tensors_of(thing, depth=4):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth and isinstance(thing, nn.Module | dict | list | tuple):
        parts = vars(thing) if isinstance(thing, nn.Module) else thing
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from tensors_of(part, depth - 1)


def test_saving_and_loading_the_buffers_is_the_identity(method, tmp_path, generator):
    weight, inputs = layer(generator)
    first, second = method(weight, inputs), method(*layer(generator))
    assert not torch.equal(first.dense(), second.dense())
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(first.dense(), second.dense())


def test_odd_sizes(method, generator):
    """One row, one column, a column count that nothing divides."""
    for out, columns in ((1, 33), (5, 1), (3, 129)):
        weight, inputs = layer(generator, out, columns)
        assert method(weight, inputs).dense().shape == (out, columns)


def test_multiplying_is_the_product_with_dense(method, generator):
    """Oracle: `dense()` and `read`, for a matrix of inputs, a batch and a single row; with and without a bias."""
    weight, inputs = layer(generator)
    compressed = method(weight, inputs)
    bias = torch.randn(6, generator=generator)
    for x in (inputs, inputs.view(2, 4, 5, 20), inputs[0]):
        assert_close(compressed.multiply(x, bias), compressed.read(x) @ compressed.dense().T + bias)
        assert_close(compressed.multiply(x), compressed.read(x) @ compressed.dense().T)
        assert (compressed.read(x) - x).norm() < 0.3 * x.norm()  # itself, or near it


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(4), torch.full((2, 3), float("nan"))])
def test_what_is_no_weight_is_refused(method, weight):
    with pytest.raises(ValueError, match="weight"):
        method(weight, torch.ones(5, weight.shape[-1]))


def test_works_on_every_architecture(method, build, tokens, logits):
    """Oracle: the model before. Every linear layer is compressed but the output, and the model still runs; also `Conv1D`."""
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = compress(model, method, [tokens])
    replaced = [module for module in small.modules() if isinstance(module, CompressedLinear)]
    assert len(replaced) == len([m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]) - 1
    assert 0 < (logits(small, tokens) - logits(model, tokens)).norm() / logits(model, tokens).norm() < 1.5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(
        logits(compress(model, method, [tokens]), tokens), logits(small, tokens)
    )  # same call, same result


def test_a_compressed_model_is_saved_and_loaded(method, build, tokens, logits, tmp_path):
    """Oracle: the compressed model; one that was compressed from other weights takes its state."""
    first, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    small, second = compress(first, method, [tokens]), compress(other, method, [tokens])
    second.load_state_dict(copy.deepcopy(small.state_dict()))
    assert torch.equal(logits(small, tokens), logits(second, tokens))


def test_a_compressed_model_is_not_compressed_again(build, tokens):
    small = compress(build(), lambda weight, inputs: Halved(weight), [tokens])
    with pytest.raises(ValueError, match="is compressed already; start from the original model"):
        compress(small, lambda weight, inputs: Halved(weight), [tokens])


# Model methods


def test_the_model_is_not_written(model_method, build, tokens):
    """Oracle: its state before, bit by bit, its configuration and its modules."""
    model = build()
    before, modules, config = copy.deepcopy(model.state_dict()), [*model.modules()], copy.deepcopy(model.config)
    small = model_method(model, [tokens])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [*model.modules()] == modules and str(model.config) == str(config)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not small.training


def test_fewer_parameters_are_held(model_method, build, tokens):
    """Oracle: counting what the state holds."""
    held = [sum(value.nbytes for value in m.state_dict().values()) for m in (model_method(build(), [tokens]), build())]
    assert 0 < held[0] < held[1]


def test_model_methods_repeat(model_method, build, tokens, logits):
    """Oracle: the first call; another model in between leaves nothing behind."""
    first = logits(model_method(build(), [tokens]), tokens)
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    model_method(other, [tokens.flip(1)])
    assert torch.equal(logits(model_method(build(), [tokens]), tokens), first)
    assert not torch.allclose(first, logits(build(), tokens))  # it did something


def test_a_batch_equals_its_rows(model_method, build, tokens, logits):
    """Oracle: the rows one by one."""
    small = model_method(build(), [tokens])
    rows = torch.cat([logits(small, row[None]) for row in tokens])
    assert_close(logits(small, tokens), rows, rtol=1e-4, atol=1e-4)  # logits of size 10 through 3 blocks


def test_a_cached_step_equals_reading_at_once(model_method, build, architecture, tokens):
    """Oracle: one forward over all tokens."""
    from refimpl.model.cache import FullCache

    small = model_method(build(), [tokens])
    with torch.no_grad():
        if architecture == "decoder":
            cache = FullCache(small.config.sliding_window)
            whole, first, second = small(tokens), small(tokens[:, :8], cache), small(tokens[:, 8:], cache)
        else:
            whole, start = small(tokens).logits, small(tokens[:, :8], use_cache=True)
            first, second = start.logits, small(tokens[:, 8:], past_key_values=start.past_key_values).logits
    assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)  # as above


def test_state_of_a_model_method_is_saved_and_loaded(model_method, build, tokens, logits, tmp_path):
    """Oracle: the compressed model, after its state went through a file."""
    small = model_method(build(), [tokens])
    kept = {name: value.clone() for name, value in small.state_dict().items()}
    save_file(kept, tmp_path / "model.safetensors")
    again = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again, tokens), logits(small, tokens))


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.999])
def test_a_budget_never_rounds_to_nothing(model_method, build, tokens, logits, sparsity):
    """Oracle: the protocol. 0 is the identity, little is more than nothing, and nearly all leaves a model that runs."""
    if not hasattr(model_method, "sparsity"):
        pytest.skip("has no sparsity")
    model = build()
    small = dataclasses.replace(model_method, sparsity=sparsity)(model, [tokens])
    same = torch.equal(logits(small, tokens), logits(model, tokens))
    assert same == (sparsity == 0)
    assert torch.isfinite(logits(small, tokens)).all()
    assert len(find_blocks(small)[1]) >= 1


# Folders

# Settings under which a model holds modules that it does not at its method's defaults.
SETTINGS = {"awq-of-layers": AWQ().layer, "omniquant-of-activations": OmniQuant(bits=4, activation_bits=4, steps=2)}
SAVED = {entry.id: entry for entry in METHODS} | SETTINGS


def made(name, tokens):
    """A decoder after a method, at its defaults or at one of the settings."""
    method = SAVED[name] if name in SETTINGS else default(SAVED[name])
    return apply(method, decoder_with_biases(), [tokens])


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_gives_back_the_model(name, tokens, tmp_path):
    """Oracle: the model in memory, bit by bit: its modules and what each holds, bytes, logits, and bytes in a cache."""
    small = made(name, tokens)
    save_compressed(small, tmp_path / "small")
    assert differences(load_compressed(tmp_path / "small"), small, tokens) == []
    assert differences(decoder_with_biases(), small, tokens) != []  # negative control


@pytest.mark.parametrize(
    ("name", "place", "plain", "seen"),
    [
        ("quarot", ["attention"], Attention, {"logits", "cached logits", "bytes of the cache"}),
        ("omniquant-of-activations", ["attention", "k_proj"], CompressedLinear, {"logits", "cached logits"}),
        ("slicegpt", [], Block, {"logits", "cached logits"}),
    ],
)
def test_one_module_that_is_dropped_is_seen(name, place, plain, seen, tokens, tmp_path):
    """Oracle: the model in memory; of one module of the folder's a plainer one is made."""
    small = made(name, tokens)
    save_compressed(small, tmp_path / "small")
    again = with_a_plainer_module(tmp_path / "small", place, plain)
    assert set(differences(again, small, tokens)) == {"modules", *seen}


# The kinds


def test_either_kind_is_applied(build, tokens, logits):
    """Oracle: `compress`, and the method's own call."""
    for entry in METHODS:
        method = default(entry)
        expected = compress(build(), method, [tokens]) if takes_layers(method) else method(build(), [tokens])
        assert torch.equal(logits(apply(method, build(), [tokens]), tokens), logits(expected, tokens))


# The driver


class Halved(CompressedWeight):
    """A stand-in for a method's result: half of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("stored", weight / 2)

    def dense(self):
        return self.stored


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3, bias=False))


def test_compress_leaves_the_model_and_replaces_every_layer(generator):
    """Oracle: by hand. Halving three weights of a bias-free ReLU network divides its output by eight."""
    model = small_model()
    for child in (model[0], model[2]):
        nn.init.zeros_(child.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(7, 4, generator=generator)
    small = compress(model, lambda weight, inputs: Halved(weight))
    assert_close(small(x), model(x) / 8)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_see_what_compressed_layers_make_of_the_data(generator):
    """Oracle: by hand. The third layer's inputs are computed through two layers that are halved already."""
    model, seen = small_model(), []
    x = torch.randn(7, 4, generator=generator)

    def halve(weight, inputs):
        seen.append(inputs)
        return Halved(weight)

    small = compress(model, halve, [x[:3], x[3:]])
    assert_close(seen[0], x)
    assert_close(seen[2], small[:3](x))
    assert not torch.allclose(seen[2], model[:3](x))


def test_target_and_skip(generator):
    small = compress(small_model(), lambda weight, inputs: Halved(weight), target=["0", "2"], skip=["2"])
    assert [isinstance(child, CompressedLinear) for child in small] == [True, False, False, False]


def test_tied_weights_are_left_alone():
    model = small_model()
    model.add_module("tied", nn.Linear(5, 5))
    model.tied.weight = model[2].weight
    small = compress(model, lambda weight, inputs: Halved(weight))
    assert isinstance(small[2], nn.Linear)
    assert isinstance(small[0], CompressedLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": ["decoder.*"]},
            r"target=\['decoder\.\*'\] with skip=\['lm_head'\] matches no linear layer; the model's: \['0', '2', '3'\]",
        ),
        ({"target": "0"}, r"target='0' must be a list of patterns: \['0'\]"),
        ({"target": ["9*"]}, "matches no linear layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress(small_model(), lambda weight, inputs: Halved(weight), **options)


def test_a_layer_that_the_data_never_reaches_is_refused():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="never reaches"):
        compress(Idle(), lambda weight, inputs: Halved(weight), [torch.ones(2, 2)])


@pytest.mark.parametrize("entry", METHODS, ids=lambda m: m.id)
def test_the_model_is_run_for_methods_that_need_data_only(entry, tokens, logits):
    """Oracle: the facet `calibration`; runs of the model are counted."""
    from tests.compression.conftest import decoder

    model, method, runs = decoder(), default(entry), []
    Counting = type(
        "Counting",
        (type(model),),
        {"forward": lambda self, *args: runs.append(0) or super(Counting, self).forward(*args)},
    )
    model.__class__ = Counting
    apply(method, model, [tokens])
    assert bool(runs) == entry.facets.calibration


def test_integers_and_what_holds_them_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer .0. holds torch\.int8; only floating-point weights"):
        compress(model, lambda weight, inputs: Halved(weight))


def test_another_method_may_take_the_layers_that_are_left(generator):
    """Oracle: by hand. Layer after layer is halved, by two calls; a layer that is compressed is named, if it is asked for."""
    half = lambda weight, inputs: Halved(weight)  # noqa: E731
    once = compress(small_model(), half, target=["0"])
    twice = compress(once, half, target=["2", "3"])
    assert [isinstance(child, CompressedLinear) for child in twice] == [True, False, True, True]
    with pytest.raises(ValueError, match="layer '0' is compressed already"):
        compress(once, half)


def test_code_that_reads_the_weight_gets_it(generator):
    """Oracle: the dense weight."""
    weight = torch.randn(3, 4, generator=generator)
    layer = CompressedLinear(Halved(weight), None)
    assert torch.equal(layer.weight, weight / 2)
    assert layer.bias is None


def test_biases_and_conv1d(generator):
    """Oracle: by hand. A layer that keeps its weight as `[in, out]` computes the same with half of it."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 4))
    nn.init.normal_(model[0].bias)
    x = torch.randn(7, 4, generator=generator)
    small = compress(model, lambda weight, inputs: Halved(weight), [x])
    assert_close(small(x), (x @ model[0].weight) / 2 + model[0].bias)
    assert small[0].weight.shape == (5, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(5, 4), r"inputs of shape \(5, 4\) must be \[n, in\] with n >= 1 and in = 3"),
        (torch.ones(0, 3), "n >= 1"),
        (torch.full((2, 3), float("inf")), "inputs hold NaN or infinity"),
    ],
)
def test_inputs_are_checked(inputs, message):
    with pytest.raises(ValueError, match=message):
        check_layer(torch.ones(2, 3), inputs)


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "wanda", "svd", "quip"])
def test_other_tools_read_what_is_decompressed(name, tokens, tmp_path):
    """Oracle: transformers, which reads the checkpoint that it writes, and runs the compressed model too."""
    from transformers import AutoModelForCausalLM

    model = llama()
    small = apply(taxonomy.load().methods[name].load()(), model, [tokens])
    with torch.no_grad():
        wanted = small(tokens).logits
        plain = decompress(small)
        plain.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_close(again(tokens).logits, wanted, rtol=1e-4, atol=1e-4)  # QuIP multiplies in another order
        assert (model(tokens).logits - wanted).abs().max() > 1e-2  # negative control
    assert any(isinstance(layer, CompressedLinear) for layer in small.modules())


def test_decompressed_layers_hold_the_dense_weight(generator):
    """Oracle: by hand: half of the weight, the same bias, and none where there was none."""
    model = small_model()
    plain = decompress(compress(model, lambda weight, inputs: Halved(weight)))
    for name in ("0", "2", "3"):
        layer, before = plain.get_submodule(name), model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, before.weight / 2)
        assert (layer.bias is None) if before.bias is None else torch.equal(layer.bias, before.bias)


def test_what_no_plain_layer_does_is_not_decompressed(generator):
    """Oracle: LLM.int8() rounds its inputs, a stand-in its outputs; the layer is named."""

    class Rounded(CompressedLinear):
        def forward(self, inputs):
            return super().forward(inputs).round()

    with pytest.raises(ValueError, match="layer '0' quantizes its inputs or outputs"):
        decompress(compress(small_model(), LLMInt8()))
    model = small_model()
    model[2] = Rounded(Halved(model[2].weight.detach()), None)
    with pytest.raises(ValueError, match="layer '2' quantizes its inputs or outputs"):
        decompress(model)
    with pytest.raises(ValueError, match="no layer of the model is compressed"):
        decompress(small_model())


def test_done_is_called_for_each_layer(generator):
    """Oracle: the names, in the order in which the data reaches them."""
    names = []
    compress(
        small_model(),
        lambda weight, inputs: Halved(weight),
        [torch.randn(2, 4, generator=generator)],
        done=names.append,
    )
    assert names == ["0", "2", "3"]
