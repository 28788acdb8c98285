"""A block that is learned: what is trained is what is put in the model."""

from contextlib import ExitStack

import pytest
import torch

from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs, hidden_states
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.learned_block import LearnedBlock, RoundedLinear
from refimpl.compression.quantization.learned_transform import LearnedTransform
from refimpl.compression.ranges import channel_ranges


@pytest.mark.parametrize("activation_bits", [None, 6])
@torch.no_grad()
def test_the_block_that_is_trained_is_the_block_that_is_held(build, block_list, tokens, activation_bits, generator):
    """Oracle: the model's own block, with packed integers, after any factors and strengths were learned."""
    model = build()
    part = anatomy(model).blocks[0]
    ranges = channel_ranges(model, [part.q, part.o, part.gate or part.up], [tokens])
    quantized = activation_bits is not None
    transform = LearnedTransform(model, part, ranges, lambda a, w: (a / w).sqrt(), shifts=quantized, heads=quantized)
    x, y, args, kwargs = next(block_inputs(model, block_list, [tokens]))[0]
    learned = LearnedBlock(
        model, f"{block_list}.0", part, bits=6, group_size=None, activation_bits=activation_bits, transform=transform
    )
    for parameter in (*learned.transform_parameters(), *learned.clipping_parameters()):
        parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    with ExitStack() as hooks:
        trained = learned.student(hooks)(x, *args, **kwargs)
    learned.install_()
    held = hidden_states(model.get_submodule(f"{block_list}.0")(x, *args, **kwargs))
    close = (held - trained).abs() < 1e-3
    assert (
        close.all(-1).float().mean() > 0.8
    )  # in the other rows a code went the other way, where a value is between two
    assert 1e-3 < (held - y).norm() / y.norm() < 0.3
    kinds = {name: type(model.get_submodule(name)) for name in part.linear}
    assert set(kinds.values()) == {CompressedLinear} | ({RoundedLinear} if quantized else set())
    assert (kinds[part.k] is RoundedLinear) == quantized and kinds[part.o] is CompressedLinear


@torch.no_grad()
def test_outputs_share_grids_as_far_as_they_should(build, tokens, architecture):
    """Oracle: counting levels: two bits have four, for each token; of all heads, or of each where positions are rotary."""
    model = build()
    part = anatomy(model).blocks[0]
    learned = LearnedBlock(model, "", part, bits=8, group_size=None, activation_bits=2, transform=None)
    learned.install_()
    made = model.get_submodule(part.k)(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    width = 8 if architecture in ("decoder", "llama") else 32
    assert learned.width(part.k) == width and learned.width(part.o) == 0
    for row in made.unflatten(-1, (-1, width)).flatten(0, 1):
        assert 2 <= len(row.unique()) <= 4
