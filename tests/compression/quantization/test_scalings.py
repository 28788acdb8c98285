"""Who shares factors, who absorbs them, and what judges them; what the modules of a block are called with."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.blocks import find_blocks
from refimpl.compression.quantization.scalings import calls_of, scalings
from refimpl.model.linear import linear_at


def test_who_shares_and_who_absorbs(build, architecture):
    """Oracle: the official code's list of each architecture. With grouped heads the output layer keeps its scale; in OPT the block itself
    is around the feed-forward; behind a GELU nothing absorbs."""
    model = build()
    part, name = anatomy(model).blocks[0], f"{find_blocks(model)[0]}.0"
    found = [
        (s.feed.producer.removeprefix(f"{name}."), [c.rpartition(".")[2] for c in s.feed.consumers], s.around and s.around.rpartition(".")[2])
        for s in scalings(model, part, name)
    ]  # fmt: skip
    expected = {
        "decoder": [
            ("attention_norm", ["q_proj", "k_proj", "v_proj"], "attention"),
            ("feed_forward_norm", ["gate_proj", "up_proj"], "feed_forward"),
            ("feed_forward.up_proj", ["down_proj"], None),
        ],
        "llama": [
            ("input_layernorm", ["q_proj", "k_proj", "v_proj"], "self_attn"),
            ("post_attention_layernorm", ["gate_proj", "up_proj"], "mlp"),
            ("mlp.up_proj", ["down_proj"], None),
        ],
        "opt": [
            ("self_attn_layer_norm", ["q_proj", "k_proj", "v_proj"], "self_attn"),
            ("self_attn.v_proj", ["out_proj"], None),
            ("final_layer_norm", ["fc1"], None),
            ("fc1", ["fc2"], None),
        ],
        "gpt2": [
            ("ln_1", ["c_attn"], "attn"),
            ("attn.c_attn", ["c_proj"], None),
            ("ln_2", ["c_fc"], "mlp"),
            ("", ["c_proj"], None),
        ],
    }
    assert found == expected[architecture]


@pytest.mark.parametrize("architecture", ["decoder", "opt"])
def test_calls_are_those_of_the_model(build, tokens, architecture):
    """Oracle: a module called again with what is told makes what it made in the model; each batch has its call."""
    model, made = build(), []
    name, _ = find_blocks(model)
    path = anatomy(model).blocks[0].q.rpartition(".")[0]
    hook = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: made.append(out))
    with torch.no_grad():
        for batch in (tokens[:2], tokens[2:]):
            model(batch)
        hook.remove()
        given = next(block_inputs(model, name, [tokens[:2], tokens[2:]]))
        told = calls_of(model, f"{name}.0", [path], given)[path]
        again = [model.get_submodule(path)(*args, **kwargs) for args, kwargs in told]
    assert len(told) == 2
    for ours, theirs in zip(again, made, strict=True):
        assert_close(*(x if isinstance(x, torch.Tensor) else x[0] for x in (ours, theirs)))
    assert linear_at(model, anatomy(model).blocks[0].q) is model.get_submodule(anatomy(model).blocks[0].q)
