"""Parts of decoders by their role, on four architectures."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.model.linear import is_linear, weight_of
from tests.compression.conftest import ARCHITECTURES, opt

NORMS = {"decoder": "norm", "llama": "model.norm", "opt": "model.decoder.final_layer_norm", "gpt2": "transformer.ln_f"}


def test_parts_are_in_the_model(build, architecture):
    """Oracle: the modules themselves. Every linear layer stands in exactly one place, the ends outside of the blocks."""
    model = build()
    parts = anatomy(model)
    inside = [name for block in parts.blocks for name in block.linear]
    outside = {"project_in", "project_out", "lm_head"}
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    assert sorted(inside) == sorted(name for name in linear if name.rpartition(".")[2] not in outside)
    assert parts.norm == NORMS[architecture]
    assert parts.reader == {"decoder": "lm_head", "opt": "model.decoder.project_out"}.get(architecture, "lm_head")
    block = parts.blocks[0]
    assert (block.n_heads, block.n_kv_heads, block.head_dim) == (4, 2 if architecture in ("decoder", "llama") else 4, 8)
    assert block.scales_through == (architecture != "gpt2")  # GELU is not homogeneous


def test_writers_make_what_enters_the_first_block(build, tokens):
    """Oracle: a hook on the first block."""
    model = build()
    made, entered = {}, []
    parts = anatomy(model)
    for name in parts.writers:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: made.update({name: out}))
    first = model.get_submodule(parts.blocks[0].attention_norm)
    first.register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    with torch.no_grad():
        model(tokens)
    assert_close(sum(made.values()).expand_as(entered[0]), entered[0])


def test_rescaling_leaves_the_function(build, tokens, logits, generator):
    """Oracle: the logits before. Control: the same with the columns of the consumers only is another function."""
    model = build()
    with torch.no_grad():  # biases are 0 and norms 1 where models begin, which would hide them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    expected = logits(model, tokens)
    found = [feed for block in anatomy(model).blocks for feed in feeds(model, block)]
    assert len(found) == 4 * (3 if not anatomy(model).blocks[0].scales_through else 4)
    for feed in found:
        before, one = copy.deepcopy(model), copy.deepcopy(model)
        producer = model.get_submodule(feed.producer)
        channels = (weight_of(producer) if is_linear(producer) else producer.weight).shape[0]
        scale = torch.rand(channels, generator=generator) * 3 + 0.5
        rescale_(model, feed, scale)
        assert not torch.equal(
            weight_of(model.get_submodule(feed.consumers[0])), weight_of(before.get_submodule(feed.consumers[0]))
        )
        with torch.no_grad():
            for name in feed.consumers:
                weight_of(one.get_submodule(name)).mul_(scale[feed.source])
        assert not torch.allclose(logits(one, tokens), expected, atol=1e-2)
    assert_close(
        logits(model, tokens), expected, rtol=1e-3, atol=1e-3
    )  # logits of size 10, sixteen rescalings in float32


def test_only_the_values_of_a_fused_layer_move():
    """Oracle: by hand. GPT-2's first 64 of 96 outputs are queries and keys."""
    model = ARCHITECTURES["gpt2"]()
    values = [*feeds(model, anatomy(model).blocks[0])][1]
    assert values.source.tolist() == list(range(64, 96))
    before = weight_of(model.transformer.h[0].attn.c_attn).clone()
    rescale_(model, values, torch.full((96,), 4.0))
    after = weight_of(model.transformer.h[0].attn.c_attn)
    assert torch.equal(after[:64], before[:64]) and torch.equal(after[64:] * 4, before[64:])


def test_an_opt_without_projections():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    parts = anatomy(OPTForCausalLM(OPTConfig(vocab_size=61, **sizes, max_position_embeddings=64)))
    assert parts.writers == ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    assert parts.reader == "lm_head"


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="a block of type Linear has another layout than those known"):
        anatomy(nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(2))))
    model = opt()
    for layer in model.model.decoder.layers:
        layer.do_layer_norm_before = False
    with pytest.raises(ValueError, match="do_layer_norm_before=False"):
        anatomy(model)


def test_a_norm_that_counts_from_one_is_refused():
    class FromOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32))

        def forward(self, x):
            return nn.functional.rms_norm(x, (32,)) * (1 + self.weight)

    model = ARCHITECTURES["llama"]()
    model.model.layers[1].input_layernorm = FromOne()
    with pytest.raises(ValueError, match=r"norm 'model\.layers\.1\.input_layernorm', a FromOne, does not multiply"):
        anatomy(model)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(31), r"must be \[32\]"),
        (torch.zeros(32), "positive and finite"),
        (torch.full((32,), float("nan")), "finite"),
    ],
)
def test_bad_scales_are_refused(scale, message):
    model = ARCHITECTURES["decoder"]()
    with pytest.raises(ValueError, match=message):
        rescale_(model, next(feeds(model, anatomy(model).blocks[0])), scale)


def test_a_compressed_layer_is_refused(tokens):
    from refimpl.compression.protocol import compress
    from refimpl.compression.quantization.weight_only.rtn import RTN

    with pytest.raises(
        ValueError, match=r"'layers\.0\.attention\.q_proj' is a CompressedLinear and must be a linear layer"
    ):
        anatomy(compress(ARCHITECTURES["decoder"](), RTN(), [tokens]))
