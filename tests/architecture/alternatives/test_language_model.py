"""The language model of mixers: the blocks written out, states in the place of a cache, generation."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig, States
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention

TOKENS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(generator):
    return make(generator)


def make(generator, **changes):
    config = LanguageModelConfig(**{"vocabulary": 61, "d_model": 32, "n_layers": 2} | changes)
    built = LanguageModel(config, lambda _: SoftmaxAttention(head_dim=8).build(config.d_model, generator))
    return built.initialize(generator, std=0.3).eval()


def test_equals_the_blocks_written_out(model):
    """Oracle: the definition, x + mixer(x / rms(x)), twice, and the embedding as output layer."""

    def normal(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    with torch.no_grad():
        x = model.embedding.weight[TOKENS]
        for block in model.layers:
            x = x + block.mixer(normal(x))
        assert_close(model(TOKENS), normal(x) @ model.embedding.weight.T)


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [7, 1, 1]])
def test_pieces_equal_the_whole(model, cuts):
    """Oracle: the whole in one call."""
    states = States()
    pieces = torch.cat([model(piece, states) for piece in TOKENS.split(cuts, dim=1)], dim=1)
    assert_close(pieces, model(TOKENS), rtol=1e-4, atol=1e-4)  # logits of size 10
    assert states.length == 9 and states.nbytes == 2 * 2 * 3 * 9 * 32 * 4


def test_greedy_generation_equals_reading_everything_again(generator):
    """Oracle: the likeliest token of the whole forward, token by token."""
    model = make(generator, tied_embeddings=False)
    expected = TOKENS
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(TOKENS, 6), expected[:, 9:])
    assert torch.equal(model.generate(TOKENS, 6, prefill_chunk=2), expected[:, 9:])
    assert len(set(expected[:, 9:].flatten().tolist())) > 3  # negative control: it says something


def test_reset_forgets(model):
    states = States()
    first = model(TOKENS, states)
    states.reset()
    assert torch.equal(model(TOKENS, states), first) and states.length == 9


def test_initialize_scales_the_residual_branches(generator):
    """Oracle: by hand, 1 / sqrt(4 layers) of what the mixers drew, and the embedding's standard deviation."""
    model = make(torch.Generator().manual_seed(0), n_layers=4, tied_embeddings=False)
    plain = SoftmaxAttention(head_dim=8).build(32, torch.Generator().manual_seed(0))
    assert_close(model.layers[0].mixer.out_proj.weight, plain.out_proj.weight / 2)
    assert torch.equal(model.layers[0].mixer.qkv_proj.weight, plain.qkv_proj.weight)
    assert model.embedding.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(model.lm_head.weight, model.embedding.weight)


def test_half_precision_sums_in_float32(model):
    """Oracle: float32 on the same weights; bf16 rounds what enters and leaves each mixer."""
    half = make(torch.Generator().manual_seed(0)).bfloat16()
    exact = make(torch.Generator().manual_seed(0))
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    logits = half(TOKENS)
    assert logits.dtype == torch.bfloat16
    block = half.layers[0]
    assert block(half.embedding(TOKENS), block.mixer.initial_state(3))[0].dtype == torch.float32
    assert (logits.float() - exact(TOKENS)).norm() / exact(TOKENS).norm() < 0.02


def test_assigned_tensors_are_checked(model):
    """Oracle: the state of another model; every fault is told in one message."""
    given = {name: value.clone() for name, value in make(torch.Generator().manual_seed(5)).state_dict().items()}
    expected = make(torch.Generator().manual_seed(5))(TOKENS)
    assert not torch.allclose(model(TOKENS), expected)
    assert torch.equal(model.assign(given, None, source="here")(TOKENS), expected)
    assert model.assign(given, torch.float64, source="here").norm.weight.dtype == torch.float64
    assert model.assign({**given, "lm_head.weight": given["embedding.weight"]}, None, source="here") is model
    for bad, message in [
        ({**given, "x": torch.ones(1)}, "x is unexpected"),
        ({**given, "norm.weight": torch.ones(3)}, r"norm.weight has shape \[3\], config.json says \[32\]"),
        ({name: value for name, value in given.items() if name != "norm.weight"}, "here: .*norm.weight is missing"),
        ({**given, "lm_head.weight": given["embedding.weight"] + 1}, "is not the embedding"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.assign(bad, None, source="here")


def test_bad_inputs_are_refused(model):
    states = States()
    model(TOKENS, states)
    for arguments, message in [
        ((TOKENS[0],), "must be"),
        ((TOKENS[:, :0],), "not empty"),
        ((TOKENS[:2], states), r"hold a batch of 3, and get 2: reset\(\)"),
        ((TOKENS, None, torch.tensor([0, 1, 0])), "takes in every token"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    assert model(TOKENS, None, torch.zeros(3, dtype=torch.long)).shape == (3, 9, 61)
    with pytest.raises(ValueError, match="n_layers=0"):
        LanguageModelConfig(vocabulary=61, d_model=32, n_layers=0)
