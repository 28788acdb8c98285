"""Reordering: the same function in float64, and channels that really moved."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.reorder import (
    movable,
    reorder_inside_,
    reorder_norm_,
    reorder_queries_and_keys_,
    reorder_values_,
)
from refimpl.model.linear import weight_of
from tests.compression.conftest import llama


def orders(sets, size, generator):
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(sets)])


def test_no_output_changes(build, tokens, logits, generator, architecture):
    """Oracle: the logits before, in float64, with biases that are not 0. Control: each step with another order in its readers."""
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    expected = logits(model, tokens)
    for part in anatomy(model).blocks:
        heads, inner = part.n_kv_heads, weight_of(model.get_submodule(part.down)).shape[1]
        readers = list(dict.fromkeys((part.q, part.k, part.v)))
        up = weight_of(model.get_submodule(part.up)).clone()
        reorder_values_(model, part, orders(heads, 8, generator))
        reorder_inside_(model, part, torch.randperm(inner, generator=generator))
        assert not torch.equal(weight_of(model.get_submodule(part.up)), up)
        if movable(model, part):
            reorder_queries_and_keys_(model, part, orders(heads, 8, generator))
        index = torch.randperm(32, generator=generator)
        reorder_norm_(model, part.attention_norm, readers, index)
        reorder_norm_(
            model,
            part.feed_forward_norm,
            [name for name in (part.gate, part.up) if name],
            torch.randperm(32, generator=generator),
        )
    assert movable(model, part) == (architecture in ("opt", "gpt2"))
    assert_close(logits(model, tokens), expected, rtol=1e-9, atol=1e-9)
    for name in (part.q, part.o, part.down):
        other = copy.deepcopy(model)
        with torch.no_grad():
            weight_of(other.get_submodule(name)).copy_(weight_of(other.get_submodule(name)).flip(1))
        assert not torch.allclose(logits(other, tokens), expected, atol=1e-2)


def test_channels_that_rotary_positions_tie_stay():
    model = llama()
    part = anatomy(model).blocks[0]
    with pytest.raises(
        ValueError, match=r"the channels of model\.layers\.0\.self_attn\.q_proj are tied to their places"
    ):
        reorder_queries_and_keys_(model, part, torch.arange(8).repeat(2, 1))
