"""Learned shifts and scales: no output changes, so that no gradient is left without rounding; where they begin; what they refuse."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.quantization.learned_block import LearnedBlock
from refimpl.compression.quantization.learned_transform import LEAST, LearnedTransform
from refimpl.compression.ranges import channel_ranges
from refimpl.model.linear import is_transposed, weight_of
from tests.compression.conftest import decoder, gpt2, llama


def root(largest, weight):
    return (largest / weight).sqrt()


def transform_of(model, tokens, **options):
    part = anatomy(model).blocks[0]
    ranges = channel_ranges(model, [part.q, part.o, part.gate or part.up], [tokens])
    return LearnedTransform(model, part, ranges, root, **options), ranges


def output_of(model, block_list, tensors, given):
    """The first block's output with these tensors."""
    block = copy.deepcopy(model.get_submodule(f"{block_list}.0"))
    for name in [name for name in tensors if name.endswith(".bias")]:
        layer = block.get_submodule(name.removeprefix(f"{block_list}.0.").removesuffix(".bias"))
        if layer.bias is None:
            layer.bias = torch.nn.Parameter(torch.zeros(0))
    replaced = {}
    for name, tensor in tensors.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        turned = name.endswith("weight") and is_transposed(layer)
        replaced[name.removeprefix(f"{block_list}.0.")] = tensor.T if turned else tensor
    x, _, args, kwargs = given
    output = functional_call(block, replaced, (x, *args), kwargs)
    return output if isinstance(output, torch.Tensor) else output[0]


def test_no_output_changes_and_so_no_gradient_is_left(build, block_list, tokens, generator, architecture):
    """Oracle: the block before, in float64, for any factors; the derivative of a constant is 0. Control: one factor left out of the
    layers that read it.
    """
    model = build().double()
    transform, _ = transform_of(model, tokens)
    transform.double()
    assert transform.shifted == (architecture in ("opt", "gpt2"))
    with torch.no_grad():
        for parameter in transform.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        given = next(block_inputs(model, block_list, [tokens]))[0]
    options = {"bits": 8, "group_size": None, "activation_bits": 8, "transform": transform}
    learned = LearnedBlock(model, f"{block_list}.0", transform.part, **options)
    tensors = {
        name: (
            weight_of(model.get_submodule(name.removesuffix(".weight")))
            if name.endswith("weight") and tensor.ndim == 2
            else tensor.double()
        )
        for name, tensor in learned.tensors.items()
    }
    for name in tensors:
        if name.endswith("bias") and model.get_submodule(name.removesuffix(".bias")).bias is not None:
            tensors[name] = model.get_parameter(name).detach()
        if tensors[name].ndim == 1 and name.endswith("weight"):
            tensors[name] = model.get_parameter(name).detach()
    made = transform(tensors)
    output = output_of(model, block_list, made, given)
    assert_close(output, given[1], rtol=1e-9, atol=1e-9)
    learned_from = [parameter for parameter in transform.parameters() if parameter.requires_grad]
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights).sum(), learned_from, retain_graph=True)
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients)
    for name in (transform.part.q, transform.part.o, transform.part.up):
        other = output_of(model, block_list, made | {f"{name}.weight": tensors[f"{name}.weight"]}, given)
        assert not torch.allclose(other, given[1], atol=1e-3)
    assert not torch.allclose(made[f"{transform.part.k}.weight"][:32], tensors[f"{transform.part.k}.weight"][:32])


def test_scales_and_shifts_begin_with_ranges(tokens):
    """Oracle: the rule written out, for what a norm feeds; the least scale; centres where there are shifts."""
    model = gpt2()
    transform, ranges = transform_of(model, tokens)
    low, high = ranges[transform.part.q]
    columns = weight_of(model.get_submodule(transform.part.q)).abs().amax(0)
    assert_close(transform.scales[0].detach(), (torch.maximum(-low, high) / columns).sqrt())
    assert_close(transform.shifts[0].detach(), (low + high) / 2)
    assert [len(scale) for scale in transform.scales] == [32, 32, 32]  # of the fused layer's 96 channels, the values
    assert not transform_of(model, tokens, shifts=False)[0].shifted
    with torch.no_grad():
        transform.scales[1].fill_(-3.0)
    transform.keep_positive_()
    assert_close(transform.scales[1].detach(), torch.full((32,), LEAST))


def test_values_that_several_heads_read_take_the_largest_of_theirs(tokens):
    """Oracle: by hand, over the two query heads that read each of two heads of values."""
    model = llama()
    transform, ranges = transform_of(model, tokens)
    largest = torch.maximum(-ranges[transform.part.o][0], ranges[transform.part.o][1]).view(2, 2, 8).amax(1)
    columns = weight_of(model.get_submodule(transform.part.o)).abs().amax(0).view(2, 2, 8).amax(1)
    assert_close(transform.scales[1].detach(), (largest / columns).sqrt().flatten())


@pytest.mark.parametrize("heads", [True, False])
def test_rotated_channels_share_a_factor(tokens, heads):
    """Oracle: counting: two heads of keys, four pairs of channels each; eight channels each where nothing is rotated."""
    transform, _ = transform_of(decoder(), tokens, heads=heads)
    assert transform.heads.shape == (2, 4) and transform.heads.requires_grad == heads
    assert transform_of(gpt2(), tokens)[0].heads.shape == (4, 8)
