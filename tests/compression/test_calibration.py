"""What reaches each layer while the ones before it are being compressed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.calibration import batches_of, inputs_by_group
from refimpl.model.linear import is_linear


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if is_linear(module) and name != "lm_head"}


def watched(model, name, batches):
    """What reaches one layer when the whole model runs."""
    rows = []
    with model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].flatten(0, -2).clone())
    ):
        for batch in batches:
            model(batch)
    return torch.cat(rows)


@torch.no_grad()
def check(model, batches):
    """Every layer's inputs are those of a run of the whole model, with all that was changed so far."""
    seen = []
    for names, inputs in inputs_by_group(model, linear_layers(model), batches):
        for name in names:
            assert_close(inputs, watched(model, name, batches))
            seen.append(name)
        for name in names:
            model.get_submodule(name).weight.mul_(0.5)
    assert sorted(seen) == sorted(linear_layers(model))


def test_inputs_come_from_what_was_changed_before(build, tokens):
    """Oracle: a run of the whole model for each layer, with all that was changed so far."""
    check(build(), [tokens, tokens[:1, :5]])


def test_layers_with_one_input_share_a_run(build, architecture, block_list, tokens):
    """Oracle: by hand, from the architecture: q, k and v share theirs, as do gate and up."""
    model = build()
    groups = [names for names, _ in inputs_by_group(model, linear_layers(model), [tokens])]
    of_a_block = [[n.rpartition(".")[2] for n in names] for names in groups if f"{block_list}.2." in names[0]]
    assert [sorted(names) for names in of_a_block] == {
        "decoder": [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "llama": [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "opt": [["k_proj", "q_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
        "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    }[architecture]


def test_runs_of_blocks_grow_linearly(build, block_list, tokens):
    """Oracle: counting. Each block runs once to watch, once for each group, once for its output; never after it is finished."""
    model, runs = build(), [0] * 4
    inside = {name: layer for name, layer in linear_layers(model).items() if name.startswith(block_list)}

    def count(place):
        return lambda *_: runs.__setitem__(place, runs[place] + 1)

    for place, block in enumerate(model.get_submodule(block_list)):
        first = next(
            module for module in block.modules() if not list(module.children())
        )  # inside of what is stood in for
        first.register_forward_pre_hook(count(place))
    groups = list(inputs_by_group(model, inside, [tokens, tokens]))
    assert len(groups) == 16
    assert runs == [2 * (1 + 4 + 1)] * 3 + [2 * (1 + 4)]
    assert all("forward" not in vars(block) for block in model.get_submodule(block_list))  # nothing is left behind


class Skipping(nn.Module):
    """Blocks that are no chain: the third also gets what the first returned."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first) + first)


class Twice(nn.Module):
    """One layer that is called twice, and one that gets a tensor which was written in place in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(x)
        y = y + self.first(y)
        z = self.first(y)
        y += 1
        return self.second(y) + z


class InPlace(nn.Module):
    """Two layers that get one tensor object, with other numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(x)
        z = self.first(y)
        y += 1
        return self.second(y) + z


class Part(nn.Module):
    """A block that sends batches of one size on to a layer outside of it."""

    def __init__(self, outside, rows):
        super().__init__()
        self.linear, self.outside, self.rows = nn.Linear(4, 4), [outside], rows

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        return self.outside[0](y) if len(y) == self.rows else y


class Routed(nn.Module):
    """A layer outside of the blocks, which some batches meet in the first block and others in the last."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Part(self.expert, rows) for rows in (5, 0, 2, 0))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WrittenBetween(nn.Module):
    """Blocks in a chain, whose outputs the model writes into."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x += 1
        return x


@pytest.mark.parametrize("model", [Skipping, Twice, InPlace, WrittenBetween])
def test_unusual_models(model, generator):
    """Oracle: as above, a run of the whole model for each layer."""
    torch.manual_seed(0)
    check(model().eval(), [torch.randn(2, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)])


def test_what_changes_behind_the_replay_is_seen(generator):
    """Oracle: as above. The expert is reached last by the first batch, when the first block is finished for the second."""
    check(Routed().eval(), [torch.randn(2, 4, generator=generator), torch.randn(5, 4, generator=generator)])


def test_hooks_of_the_users_run_once(generator):
    """Oracle: as above. A hook that changes what a finished block returns runs on what stands in for it, and not twice."""
    model = nn.Module()
    torch.manual_seed(0)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, y: 2 * y + 1)
    model.forward = lambda x: model.blocks[2](model.blocks[1](model.blocks[0](x)))
    check(model, [torch.randn(5, 4, generator=generator)])


def test_inference_mode_is_no_obstacle(tokens, build):
    """Oracle: no tensor's version is known there, so that no two layers may share a run."""
    with torch.inference_mode():
        model = build()
        groups = [names for names, _ in inputs_by_group(model, linear_layers(model), [tokens])]
        assert len(groups) >= 16 and {len(names) for names in groups} == {1}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.ones(2, 3), r"calibration is one Tensor and must be a list of batches, .*put it in \[ \]"),
        ({"input_ids": torch.ones(2, 3)}, "calibration is one dict"),
        ("some text", "calibration is one str"),
        ([[torch.ones(2, 3)]], "calibration batch 0 is a list and must be a tensor or a dict"),
        ([torch.ones(2, 3), torch.ones(0, 3)], r"calibration batch 1 is empty: \[0, 3\] of torch.float32"),
        ([{"input_ids": torch.ones(2, 0)}], r"calibration batch 0 is empty: {input_ids: \[2, 0\]"),
    ],
)
def test_what_is_no_list_of_batches_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        batches_of(calibration)


def test_batches_may_come_from_an_iterator_or_a_tokenizer():
    """Oracle: by hand; what tokenizers of transformers return is a mapping, and no dict."""
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": torch.ones(1, 2)})
    assert batches_of(iter([batch])) == [batch]
    assert batches_of(()) == []


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(2, 5), r"the model can't take calibration batch 1, \[2, 5\] of torch.float32: mat1 and mat2"),
        ({"y": torch.ones(2, 3)}, r"batch 1, {y: \[2, 3\] of torch.float32}: .*unexpected keyword"),
        (torch.full((2, 4), float("nan")), "makes NaN or infinity in the inputs of layer '0'"),
    ],
)
def test_data_that_does_not_fit_is_refused(batch, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        list(inputs_by_group(model, linear_layers(model), [torch.ones(1, 4), batch]))


def test_tokens_outside_the_vocabulary_are_refused(build, architecture):
    model = build()
    with pytest.raises(
        ValueError, match=r"can't take calibration batch 0, \[1, 1\] of torch.int64: index out of range"
    ):
        list(inputs_by_group(model, linear_layers(model), [torch.tensor([[61]])]))
