"""Shifts of norms: no output changes, and the norm's does, by what was asked for."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds
from refimpl.compression.shift import is_shiftable, shift_
from tests.compression.conftest import decoder, gpt2, opt


def shiftable(model):
    return [f for block in anatomy(model).blocks for f in feeds(model, block) if is_shiftable(model, f)]


@pytest.mark.parametrize("build", [opt, gpt2])
def test_shifting_leaves_the_function(build, tokens, logits, generator):
    """Oracle: the logits before, in float64; the norm's output moves by the shift. Control: the norm alone is another function."""
    model = build().double()
    expected, seen = logits(model, tokens), []
    found = shiftable(model)
    assert len(found) == 2 * 4
    norm = model.get_submodule(found[0].producer)
    norm.register_forward_hook(lambda _m, _a, output: seen.append(output))
    logits(model, tokens)
    one = copy.deepcopy(model)
    shifts = [torch.randn(32, generator=generator, dtype=torch.float64) for _ in found]
    for feed, shift in zip(found, shifts, strict=True):
        assert_close(shift_(model, feed, shift), shift)
    assert_close(logits(model, tokens), expected, rtol=1e-10, atol=1e-10)
    assert_close(seen[-1], seen[0] - shifts[0])
    with torch.no_grad():
        one.get_submodule(found[0].producer).bias.sub_(shifts[0])
    assert not torch.allclose(logits(one, tokens), expected, atol=1e-2)


def test_readers_without_a_bias_get_one(tokens, logits):
    """Oracle: the logits before."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=61, num_attention_heads=4, init_std=0.3, enable_bias=False, **sizes)
    model = OPTForCausalLM(config).eval().double()
    expected, feed = logits(model, tokens), shiftable(model)[0]
    shift_(model, feed, torch.arange(32.0, dtype=torch.float64))
    assert model.get_submodule(feed.consumers[0]).bias.abs().max() > 1
    assert_close(logits(model, tokens), expected, rtol=1e-9, atol=1e-9)


def test_half_precision_shifts_by_what_the_bias_takes():
    """Oracle: bfloat16's spacing near 1, 2^-7: the bias 0 - 1.001 becomes -1, and the readers make up for 1."""
    model = opt().bfloat16()
    feed = shiftable(model)[0]
    assert shift_(model, feed, torch.full((32,), 1.001)).tolist() == [1.0] * 32
    layer = model.get_submodule(feed.consumers[0])
    assert_close(layer.bias, layer.weight.float().sum(1).bfloat16())


def test_what_has_no_bias_is_refused():
    model = decoder()
    feed = next(feeds(model, anatomy(model).blocks[0]))
    assert shiftable(model) == []
    with pytest.raises(ValueError, match=r"layers\.0\.attention_norm has no bias that could take a shift"):
        shift_(model, feed, torch.ones(32))
