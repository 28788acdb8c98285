"""What a decoder computes inside: put together again, it must give what the decoder gives."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.distillation.inside import decoder_of, read
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

SIZES = {"vocabulary": 13, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 24}


def decoder(generator, **more):
    return initialize_(Decoder(Config(**SIZES, **more)), generator, std=0.3).double()


@pytest.mark.parametrize("window", [(), (None, 3, None)], ids=["all", "window"])
def test_scores_are_those_attention_uses(generator, window):
    """Oracle: attention's output is softmax(scores) V; and its inputs and outputs, seen from outside."""
    model, seen = decoder(generator, sliding_window=window), []

    def watch(attend):
        def watched(q, k, v, **options):
            seen.append((v, attend(q, k, v, **options)))
            return seen[-1][1]

        return watched

    for layer in model.layers:
        layer.attention.attend = watch(layer.attention.attend)
    inside = read(model, torch.randint(0, 13, (2, 7), generator=generator), scores=True)
    for (scores, visible), (v, out) in zip(inside.scores, seen, strict=True):
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        assert_close(weights @ v.repeat_interleave(2, dim=1), out)
    _, visible = inside.scores[1]
    assert bool(visible.expand(2, 4, 7, 7)[0, 0, 5, 0]) == (not window)  # a window of 3 ends before


def test_embedding_and_layers_give_the_logits(generator):
    """Oracle: the decoder: its embedding's rows, and its norm and output layer on the last layer's output."""
    model, tokens = decoder(generator), torch.randint(0, 13, (2, 7), generator=generator)
    inside = read(nn.Sequential(model), tokens, scores=False)
    assert torch.equal(inside.embedding, model.embedding.weight[tokens])
    assert_close(model.logits(model.norm(inside.hidden[-1])), model(tokens))
    assert len(inside.hidden) == 3 and not inside.scores
    assert not torch.allclose(inside.hidden[0], inside.hidden[1])


def test_gradients_reach_what_was_read(generator):
    """Oracle: what each part depends on: the first layer's scores on its queries, but on no feed-forward."""
    model = decoder(generator)
    inside = read(model, torch.randint(0, 13, (2, 7), generator=generator), scores=True)
    inside.scores[0][0].square().mean().backward()
    assert model.layers[0].attention.q_proj.weight.grad.abs().max() > 0
    assert model.layers[0].feed_forward.up_proj.weight.grad is None


def test_the_decoder_is_left_as_it_was(generator, monkeypatch):
    """Oracle: its attention functions and hooks before, also after an error."""
    model = decoder(generator)
    before = [layer.attention.attend for layer in model.layers]

    def is_as_before():
        kept = [layer.attention.attend is attend for layer, attend in zip(model.layers, before, strict=True)]
        return all(kept) and not any(module._forward_hooks for module in model.modules())

    read(model, torch.ones(1, 3, dtype=torch.int64), scores=True)
    assert is_as_before()
    with pytest.raises(ValueError, match="tokens of shape"):
        read(model, torch.ones(1, 0, dtype=torch.int64), scores=True)
    assert is_as_before()


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has no inner layers known here"):
        decoder_of(nn.Linear(2, 2))
