"""Gates on a decoder, and the model cut to them: equal logits, sizes by hand, models rebuilt from their configuration."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.pruning.gates import Shape, cut_, gated, open_gates, shape_of
from refimpl.model.config import Config
from refimpl.model.load import load, save
from refimpl.model.model import Decoder, initialize_
from tests.compression.conftest import decoder, gpt2, llama, opt


def gates_for(shape, new, generator):
    """Random gates between 0.5 and 1.5, as many of them 0 as a new shape asks for."""
    gates = {kind: 0.5 + torch.rand(x.shape, generator=generator) for kind, x in open_gates(shape).items()}
    for kind, x in gates.items():
        for row in x.view(-1, x.shape[-1]):
            row[torch.randperm(len(row), generator=generator)[new.of(kind) :]] = 0
    return gates


def smaller(model):
    """A shape that is smaller in every way, and that the architecture can say."""
    heads = anatomy(model).blocks[0].n_kv_heads
    return Shape(d_model=24 if heads == 4 else 19, n_layers=3, n_kv_heads=heads * 3 // 4, d_ff=13)


def test_a_cut_model_is_the_gated_model(build, tokens, logits, generator):
    """Oracle: the whole model with its gates; also where the output layer is the embedding, as in GPT-2. Open gates change nothing."""
    model = build()
    shape, parts = shape_of(model), anatomy(model)
    gates = gates_for(shape, smaller(model), generator)
    small = copy.deepcopy(model)
    cut_(small, gates)
    with gated(model, parts, gates):
        expected = logits(model, tokens)
    assert_close(logits(small, tokens), expected, rtol=1e-4, atol=1e-4)
    assert shape_of(small) == smaller(model)
    with gated(model, parts, open_gates(shape)):
        assert_close(logits(model, tokens), logits(build(), tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(model, tokens), atol=0.1)  # negative control


@pytest.mark.parametrize("kind", ["hidden", "blocks", "heads", "inner"])
def test_each_kind_alone(kind, build, tokens, logits, generator):
    """Oracle: the gated model, one kind at a time; and that kind changes the logits."""
    model = build()
    shape = shape_of(model)
    gates = open_gates(shape) | {kind: gates_for(shape, smaller(model), generator)[kind]}
    if kind in ("hidden", "heads") and shape.n_kv_heads == 4:
        gates["hidden"][24:], gates["heads"][:, 3:] = 0, 0  # OPT and GPT-2 lose both together
        gates["hidden"][:24], gates["heads"][:, :3] = (
            gates["hidden"][:24].clamp_min(0.5),
            gates["heads"][:, :3].clamp_min(0.5),
        )
    small = copy.deepcopy(model)
    cut_(small, gates)
    with gated(model, anatomy(model), gates):
        assert_close(logits(small, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(small, tokens), logits(model, tokens), atol=0.1)


def test_tied_embeddings_stay_tied(tokens, logits, generator):
    """Oracle: the gated model; one tensor serves as embedding and as output layer."""
    shape = {"vocabulary": 61, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    model = initialize_(Decoder(Config(n_layers=2, tied_embeddings=True, **shape)), generator, std=0.3).eval()
    gates = gates_for(shape_of(model), Shape(d_model=11, n_layers=2, n_kv_heads=1, d_ff=7), generator)
    small, other = copy.deepcopy(model), gpt2()
    cut_(small, gates)
    with gated(model, anatomy(model), gates):
        assert_close(logits(small, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    cut_(other, gates_for(shape_of(other), smaller(other), generator))
    assert other.lm_head.weight is other.transformer.wte.weight


def test_parameters_by_hand(generator):
    """Oracle: counting. Embedding, output layer and last norm; in each block two norms, attention and feed-forward."""
    model = decoder()
    cut_(model, gates_for(shape_of(model), Shape(d_model=19, n_layers=3, n_kv_heads=1, d_ff=13), generator))
    block = 2 * 19 + 19 * (2 * 16 + 2 * 8) + 3 * 19 * 13
    assert sum(p.numel() for p in model.parameters()) == 2 * 61 * 19 + 19 + 3 * block


@pytest.mark.parametrize("build", [llama, opt, gpt2])
def test_transformers_rebuilds_it_from_its_configuration(build, tokens, logits, generator):
    """Oracle: a new model of the same configuration, which takes the state and says the same."""
    model = build()
    cut_(model, gates_for(shape_of(model), smaller(model), generator))
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    assert_close(logits(new, tokens), logits(model, tokens))


def test_a_decoder_is_saved_and_loaded(tokens, logits, generator, tmp_path):
    """Oracle: the cut model."""
    shape = {"vocabulary": 61, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    model = initialize_(Decoder(Config(n_layers=2, **shape)), generator, std=0.3).eval()
    cut_(model, gates_for(shape_of(model), Shape(d_model=18, n_layers=1, n_kv_heads=1, d_ff=13), generator))
    save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens), logits(model, tokens))


def test_what_has_no_shape_is_refused(generator):
    gates = open_gates(shape_of(decoder()))
    gates["inner"][2, 0] = 0
    with pytest.raises(ValueError, match=r"inner gates open in each block: \[39, 40\]; all must have as many"):
        cut_(decoder(), gates)
    gates["inner"][:] = 0
    with pytest.raises(ValueError, match=r"inner gates open in each block: \[0\]"):
        cut_(decoder(), gates)
    gates = gates_for(shape_of(opt()), Shape(d_model=20, n_layers=4, n_kv_heads=3, d_ff=40), generator)
    with pytest.raises(
        ValueError, match="d_model=20 with n_kv_heads=3: in a OPTForCausalLM the stream must be as wide as its heads, 8"
    ):
        cut_(opt(), gates)
    uneven = decoder()
    uneven.layers[0].feed_forward.up_proj = torch.nn.Linear(32, 9, bias=False)
    with pytest.raises(ValueError, match="blocks of 2 shapes"):
        shape_of(uneven)
