"""Blocks of models, found and dropped."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.blocks import block_lists, find_blocks, keep_blocks


def test_blocks_of_known_architectures(build, block_list):
    """Oracle: the sources of transformers 5.23 and of `refimpl.model`."""
    name, blocks = find_blocks(build())
    assert name == block_list
    assert len(blocks) == 4


class Two(nn.Module):
    """Encoder and decoder, blocks with a list inside, and lists that are no blocks."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Inner() for _ in range(2))
        self.decoder = nn.ModuleList(Inner() for _ in range(3))
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.empty = nn.ModuleList()
        self.plain = nn.ModuleList([nn.ReLU(), nn.ReLU()])


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def test_lists_by_hand():
    assert list(block_lists(Two())) == ["encoder", "decoder"]
    assert find_blocks(Two(), "decoder")[0] == "decoder"


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "the model has no blocks: no torch.nn.ModuleList"),
        (Two(), None, r"several lists of blocks, \['decoder', 'encoder'\]: name one by `blocks`"),
        (Two(), "layers", r"blocks='layers' is no list of blocks of the model; it has \['decoder', 'encoder'\]"),
        (Two(), "mixed", "blocks='mixed' is no list"),
    ],
)
def test_what_has_no_blocks_is_refused(model, name, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(model, name)


@pytest.mark.parametrize("kept", [[1, 3], [0, 1, 2, 3], [2]])
def test_keeping_some_is_running_these(build, block_list, kept, tokens, logits):
    """Oracle: the whole model, whose other blocks return their input."""
    model, skipping = build(), build()
    keep_blocks(model, block_list, kept)
    for place, block in enumerate(skipping.get_submodule(block_list)):
        if place not in kept:
            block.forward = lambda x, *args, **kwargs: x
    assert_close(logits(model, tokens), logits(skipping, tokens))
    assert len(model.get_submodule(block_list)) == len(kept)
    assert (logits(model, tokens) - logits(build(), tokens)).abs().max() > 0.01 or len(kept) == 4


def test_places_and_configuration(build, architecture, block_list):
    """Oracle: a model that was built with fewer blocks."""
    model = build()
    keep_blocks(model, block_list, [1, 2])
    held = [vars(m)[key] for m in model.modules() for key in ("layer", "layer_idx") if key in vars(m)]
    assert sorted(set(held)) == [0, 1]
    if architecture == "decoder":
        assert (model.config.n_layers, model.config.sliding_window) == (2, (3, None))
    else:
        assert model.config.num_hidden_layers == 2


def test_lists_of_the_configuration_are_cut_too(tokens, logits):
    """Oracle: by hand. Qwen2 says for each layer whether it sees a window; what is no entry per layer stays."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=61, num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=3, **sizes
    )
    model = Qwen2ForCausalLM(config).eval()
    keep_blocks(model, "model.layers", [0, 2, 3])
    assert list(model.config.layer_types) == ["full_attention", "full_attention", "sliding_attention"]
    assert logits(model, tokens).shape == (3, 11, 61)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 14)
