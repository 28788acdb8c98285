"""The turned stream: identities in float64, on four architectures, each with a control that must fail."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.quantization.rotation import haar
from refimpl.compression.rotation import fold_norms_, read_in_, rotate_stream_, stream_writers, write_in_
from refimpl.model.config import Config
from refimpl.model.load import load, save
from refimpl.model.model import Decoder, RMSNorm, initialize_

NORMS = 1e-9  # the norms' small constant stands beside a mean square that the turn rounds otherwise


@pytest.fixture(autouse=True)
def _norms_in_float64(monkeypatch):
    """transformers' RMSNorm computes in float32, whatever the model's dtype; here it keeps the dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(norm, x):
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def lively(model, generator):
    """The model in float64, with norms and biases that are not one and zero."""
    for parameter in model.double().parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.7, std=0.3, generator=generator)
    return model


def test_folded_norms_leave_the_function(build, architecture, tokens, logits, generator):
    """Oracle: the model before (SliceGPT, Section 3.2). Norms have weight one, and what is written has mean zero after LayerNorm."""
    model = lively(build(), generator)
    folded = copy.deepcopy(model)
    parts = fold_norms_(folded)
    assert_close(logits(folded, tokens), logits(model, tokens), rtol=NORMS, atol=NORMS)
    norms = [module for module in folded.modules() if "Norm" in type(module).__name__]  # two a block, one at the end
    assert len(norms) == 9 and all(isinstance(norm, RMSNorm) and (norm.weight == 1).all() for norm in norms)
    means = [folded.get_submodule(parts.blocks[1].o), model.get_submodule(parts.blocks[1].o)]
    bare = [float(layer(torch.ones(1, 32).double()).detach().mean().abs()) < 1e-12 for layer in means]
    assert bare == [architecture in ("opt", "gpt2"), False]


def test_a_rotated_stream_leaves_the_function(build, tokens, logits, generator):
    """Oracle: the model before (SliceGPT, Eq. 2). Control: a Q that is not orthogonal, and norms that are not folded."""
    model = lively(build(), generator)
    q = haar(32, generator)
    turned = copy.deepcopy(model)
    parts = fold_norms_(turned)
    skewed = copy.deepcopy(turned)
    rotate_stream_(turned, parts, q)
    assert_close(logits(turned, tokens), logits(model, tokens), rtol=NORMS, atol=NORMS)
    rotate_stream_(skewed, parts, q * torch.linspace(0.5, 2, 32).double())
    assert not torch.allclose(logits(skewed, tokens), logits(model, tokens), rtol=0.1)
    unfolded = copy.deepcopy(model)
    rotate_stream_(unfolded, parts, q)
    assert not torch.allclose(logits(unfolded, tokens), logits(model, tokens), rtol=0.1)


def test_the_stream_itself_is_turned(build, block_list, tokens, logits, generator):
    """Oracle: the folded model's stream times Q, seen at a block in the middle."""
    folded = lively(build(), generator)
    parts = fold_norms_(folded)
    q, streams = haar(32, generator), []
    turned = copy.deepcopy(folded)
    rotate_stream_(turned, parts, q)
    for model in (folded, turned):
        block = model.get_submodule(block_list)[2]
        block.register_forward_pre_hook(lambda _, args, kwargs: streams.append(args[0].detach()), with_kwargs=True)
        logits(model, tokens)
    assert_close(streams[1], streams[0] @ q, rtol=NORMS, atol=NORMS)
    assert (streams[1] - streams[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_tied_embeddings_are_untied(kind, tokens, logits, generator):
    """Oracle: the tied model. The output layer then has the norm in it, the embedding has not, and the configuration says so."""
    if kind == "decoder":
        sizes = {"vocabulary": 61, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
        model = initialize_(Decoder(Config(n_layers=2, tied_embeddings=True, **sizes)), generator, std=0.3)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=61, initializer_range=0.3, tie_word_embeddings=True, **sizes))
    model = lively(model.eval(), generator)
    turned = copy.deepcopy(model)
    rotate_stream_(turned, fold_norms_(turned), haar(32, generator))
    assert_close(logits(turned, tokens), logits(model, tokens), rtol=NORMS, atol=NORMS)
    table = turned.embedding if kind == "decoder" else turned.model.embed_tokens
    assert turned.lm_head.weight is not table.weight
    flags = ("tied_embeddings", "tie_word_embeddings")
    assert [getattr(m.config, flag) for m in (model, turned) for flag in flags if hasattr(m.config, flag)] == [
        True,
        False,
    ]


def test_a_turned_decoder_is_an_ordinary_checkpoint(tokens, logits, generator, tmp_path):
    """Oracle: the model before it is written."""
    sizes = {"vocabulary": 61, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    model = initialize_(Decoder(Config(n_layers=2, tied_embeddings=True, **sizes)), generator, std=0.3).eval()
    rotate_stream_(model, fold_norms_(model), haar(32, generator))
    save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens), logits(model, tokens))


def test_rows_and_columns_go(generator):
    """Oracle: by hand. A writer of 5 channels and a reader of 5, through a Q of 3 columns, are of 3; their product is $W Q Q^T V$."""
    from transformers.pytorch_utils import Conv1D

    q = haar(5, generator)[:, :3]
    for writer, reader in ((nn.Linear(4, 5), nn.Linear(5, 2)), (Conv1D(5, 4), Conv1D(2, 5))):
        pair, x = nn.Sequential(writer, reader).double(), torch.randn(7, 4, generator=generator).double()
        expected = pair[1](pair[0](x) @ q @ q.T)
        write_in_(pair[0], q)
        read_in_(pair[1], q)
        assert pair[0](x).shape == (7, 3)
        assert_close(pair(x), expected)
    table = nn.Embedding(6, 5).double()
    expected = table(torch.arange(6)) @ q
    write_in_(table, q)
    assert_close(table(torch.arange(6)), expected)
    assert table.embedding_dim == 3


def test_half_precision(build, tokens, logits, generator):
    """Oracle: the float32 logits. Weights stay in bfloat16."""
    model = build().bfloat16()
    turned = copy.deepcopy(model)
    rotate_stream_(turned, fold_norms_(turned), haar(32, generator))
    assert {p.dtype for p in turned.parameters()} == {torch.bfloat16}
    off = (logits(turned, tokens).float() - logits(build(), tokens)).norm() / logits(build(), tokens).norm()
    before = (logits(model, tokens).float() - logits(build(), tokens)).norm() / logits(build(), tokens).norm()
    assert off < 4 * before


def test_all_writers_are_named(build):
    """Oracle: by hand. Four blocks write twice each; OPT and GPT-2 have positions beside the embedding."""
    parts = anatomy(build())
    assert len(stream_writers(parts)) == 8 + len(parts.writers)
    assert len(parts.writers) in (1, 2)


def test_a_model_without_an_output_layer_is_refused(tokens):
    from tests.compression.conftest import opt

    model = opt()
    model.model.decoder.final_layer_norm = None
    with pytest.raises(ValueError, match="must end in a norm and an output layer"):
        fold_norms_(model)
