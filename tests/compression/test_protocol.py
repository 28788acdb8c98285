"""What every per-layer compression method must satisfy, and the driver that takes one over a model.

A method joins by being implemented below `compression/`; one whose facets say that it is not called on a layer's weight is skipped.
"""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, compress

METHODS = taxonomy.load().find(category="compression", implemented=True)


@pytest.fixture(params=METHODS, ids=lambda m: m.id)
def method(request):
    """A method of the family in its default configuration."""
    implementation = request.param.load()()
    if list(inspect.signature(implementation).parameters)[:2] != ["weight", "inputs"]:
        pytest.skip("takes a whole model, not a layer's weight")
    return implementation


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
        ({"calibration": [torch.zeros(0, 4)], "target": ["9*"]}, "matches no linear layer"),
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
