"""What blocks get and return: hooks say the same."""

import torch
from torch.testing import assert_close

from refimpl.compression.block_inputs import block_inputs, to_float


def test_block_inputs_are_what_the_blocks_get(build, block_list, tokens):
    """Oracle: hooks on the blocks while the model runs; calling a block again with what was kept gives its output."""
    model, seen = build(), []
    handles = [
        block.register_forward_hook(
            lambda _m, args, kwargs, out: seen.append(
                (args[0] if args else kwargs["hidden_states"], out if isinstance(out, torch.Tensor) else out[0])
            ),
            with_kwargs=True,
        )
        for block in model.get_submodule(block_list)
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for (x, y), given in zip(seen, block_inputs(model, block_list, [tokens]), strict=True):
            assert_close(given[0][0], x)
            assert_close(given[0][1], y)
    assert not any(block._forward_pre_hooks for block in model.get_submodule(block_list))


def test_only_floats_become_floats():
    """Oracle: by hand."""
    half, whole = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int64)
    made = to_float({"a": (half, whole), "b": None, "c": [half]})
    assert [x.dtype for x in (*made["a"], *made["c"])] == [torch.float32, torch.int64, torch.float32]
    assert made["b"] is None and type(made["a"]) is tuple and type(made["c"]) is list
