"""Reruns of a block: the same block called by hand, with other weights put in its place."""

import copy

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.block_inputs import block_inputs
from refimpl.compression.reruns import Output, Rerun
from refimpl.model.linear import weight_of


@torch.no_grad()
def test_outputs_are_those_of_the_block_with_these_weights(build, block_list, tokens, architecture):
    """Oracle: a copy of the model whose weights are overwritten, watched by a hook; the original stays as it is."""
    model = build()
    part = anatomy(model).blocks[0]
    names = list(dict.fromkeys((part.q, part.k, part.v)))
    x, _, args, kwargs = next(block_inputs(model, block_list, [tokens]))[0]
    rerun = Rerun(model.get_submodule(f"{block_list}.0"), x, args, kwargs)
    around = model.get_submodule(names[0].rpartition(".")[0])
    inputs, args, kwargs = rerun.seen_by(model.get_submodule(names[0]), around)
    output = Output(model, names, part.o, args, kwargs)
    changed = copy.deepcopy(model)
    for name in names:
        weight_of(changed.get_submodule(name)).mul_(0.5)
    seen = []
    changed.get_submodule(part.o).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    changed(tokens)
    assert_close(output(inputs, output.weight / 2), seen[0], rtol=1e-4, atol=1e-5)  # a sum of 32 in another order
    assert not torch.allclose(output(inputs, output.weight), seen[0], atol=1e-2)
    assert_close(rerun(), next(block_inputs(model, block_list, [tokens]))[0][1])
    plain = Output(model, [part.up], None, (), {})
    assert_close(plain(inputs, plain.weight), F.linear(inputs, weight_of(model.get_submodule(part.up))))
    assert not any(module._forward_pre_hooks for module in model.modules())
