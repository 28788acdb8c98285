"""The encoder sees both sides, padding is nothing to it, and files hold all of it."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from refimpl.data.prompting.compression.token_classifier import TokenClassifier, attend_both_sides, load, save
from refimpl.model.config import Config, Rope
from refimpl.model.model import Attention, Decoder, attend, initialize_
from refimpl.testbed.tokenizer import tokenizer

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def classifier(**shape):
    config = Config(
        **{"vocabulary": 11, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}
        | shape
    )
    made = TokenClassifier(Decoder(config))
    generator = torch.Generator().manual_seed(0)
    initialize_(made.encoder, generator, std=0.3)
    torch.nn.init.normal_(made.head.weight, generator=generator)
    return made.eval()


def test_a_later_token_changes_an_earlier_probability():
    """Oracle: the definition of an encoder; negative control: with the decoder's own attention nothing before it changes."""
    other = TOKENS.clone()
    other[0, 5] = 7
    both = classifier()
    assert (both(TOKENS) - both(other)).abs()[0, :5].amax(dim=1).min() > 1e-4
    for module in both.modules():
        if isinstance(module, Attention):
            module.attend = attend
    assert torch.equal(both(TOKENS)[0, :5], both(other)[0, :5])
    assert not torch.equal(both(TOKENS)[0, 5:], both(other)[0, 5:])


def test_attention_by_its_formula(generator):
    """Oracle: softmax(q k' / sqrt d) v over all keys that are no padding, in float64, with a key head for two query heads."""
    q = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 1, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = q @ k.transpose(2, 3) / 2
    assert_close(attend_both_sides(q, k, v, causal=True), scores.softmax(-1) @ v)
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & (torch.arange(5) >= torch.tensor([0, 2])[:, None, None])
    hidden = (torch.arange(5) < torch.tensor([0, 2])[:, None])[:, None, None]
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    assert_close(attend_both_sides(q, k, v, mask=causal[:, None]), expected)
    assert not torch.allclose(expected[1], (scores.softmax(-1) @ v)[1])  # negative control


def test_probabilities_by_hand():
    """Oracle: softmax of (0, log 3) is (1/4, 3/4)."""
    made = classifier()
    torch.nn.init.zeros_(made.head.weight)
    made.head.bias.data = torch.tensor([0.0, math.log(3)])
    assert_close(made.probabilities([[1, 2]])[0], torch.tensor([0.75, 0.75]))


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_texts_in_a_batch_are_as_alone(batch):
    """Oracle: each text without padding, one by one, in the order given."""
    made, texts = classifier(), [[1, 2, 3, 4, 5], [6], [7, 8, 9], [1, 2, 3, 4, 6]]
    for found, text in zip(made.probabilities(texts, batch), texts, strict=True):
        assert_close(found, made(torch.tensor([text])).softmax(-1)[0, :, 1].detach())
    assert not torch.equal(made.probabilities(texts)[0][:4], made.probabilities(texts)[3][:4])  # negative control


def test_a_file_holds_shape_weights_and_tokenizer(tmp_path):
    """Oracle: what was saved, in float16's precision."""
    made = classifier(rope=Rope(theta=500.0), tied_embeddings=True, qk_norm=True)
    save(made, tokenizer(), tmp_path / "c.safetensors")
    found, known = load(tmp_path / "c.safetensors")
    assert found.encoder.config == made.encoder.config and not found.training
    assert known.to_str() == tokenizer().to_str()
    assert_close(dict(found.state_dict()), {n: w.half().float() for n, w in made.state_dict().items()}, rtol=0, atol=0)
    found.double()
    assert found(TOKENS).dtype == torch.float64


def test_files_that_hold_no_classifier_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file"):
        load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: holds no classifier"):
        load(tmp_path / "other.safetensors")
