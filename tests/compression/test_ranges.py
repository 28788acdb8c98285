"""Ranges of channels: held by hooks and plain extremes."""

import pytest
import torch
from torch import nn

from refimpl.compression.anatomy import anatomy
from refimpl.compression.ranges import channel_ranges


def test_extremes_of_all_batches(build, tokens):
    """Oracle: the extremes of everything that hooks collect, over both batches."""
    model = build()
    part = anatomy(model).blocks[1]
    seen = {part.o: [], part.attention_norm: []}
    model.get_submodule(part.o).register_forward_pre_hook(lambda _m, args: seen[part.o].append(args[0].flatten(0, 1)))
    norm = model.get_submodule(part.attention_norm)
    norm.register_forward_hook(lambda _m, _a, output: seen[part.attention_norm].append(output.flatten(0, 1)))
    found = channel_ranges(model, [part.o], [tokens[:1], tokens[1:]], made=[part.attention_norm])
    for name, rows in seen.items():
        values = torch.cat(rows)
        assert len(values) == tokens.numel()
        assert torch.equal(found[name][0], values.amin(0)) and torch.equal(found[name][1], values.amax(0))
        assert not torch.equal(found[name][1], rows[0].amax(0))  # negative control: the first batch alone


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleDict({"used": nn.Identity(), "idle": nn.Identity()}), "never reaches layer 'idle'"),
        (nn.Sequential(nn.Identity(), nn.Linear(2, 2)), "makes NaN or infinity in the outputs of layer '1'"),
    ],
)
def test_what_is_missing_or_not_finite_is_refused(model, message):
    if isinstance(model, nn.ModuleDict):
        model.forward = lambda x: x
        with pytest.raises(ValueError, match=message):
            channel_ranges(model, ["idle"], [torch.ones(1, 2)])
        return
    nn.init.constant_(model[1].weight, float("inf"))
    with pytest.raises(ValueError, match=message):
        channel_ranges(model, ["0"], [torch.ones(1, 2)], made=["1"])
