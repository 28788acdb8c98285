"""Mixtures in a decoder: which layers, each loss once, nothing kept alive; the list of methods is the taxonomy's."""

import pytest
import torch
from torch.testing import assert_close

import taxonomy
from refimpl.architecture.moe.decoder import FeedForward, mixtures, replace_feed_forward, take_auxiliary_loss
from refimpl.architecture.moe.models.switch import Switch
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

METHODS = [m for m in taxonomy.load().find(category="architecture/moe", implemented=True) if "moe" in m.arena]


@pytest.fixture(params=METHODS, ids=lambda m: m.id)
def method(request):
    """The method at the settings of the arena's quick form."""
    return request.param.load()(**{name: values[0] for name, values in request.param.arena["moe"].items()})


def decoder():
    config = Config(vocabulary=61, d_model=8, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=12)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3)


def test_in_a_decoder(method):
    """Oracle: the sum of what the layers returned on their own, and each loss taken once."""
    generator = torch.Generator().manual_seed(0)
    model = replace_feed_forward(decoder(), method, every=2, generator=generator)
    assert [isinstance(layer.feed_forward, FeedForward) for layer in model.layers] == [False, True, False, True]
    seen, tokens = [], torch.arange(20).view(2, 10)
    for layer in mixtures(model):
        layer.generator = torch.Generator().manual_seed(3)
        layer.moe.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    logits = model.train()(tokens)
    assert logits.shape == (2, 10, 61) and mixtures(model)[0].routing.load.sum() > 0
    taken = take_auxiliary_loss(model)
    assert_close(taken, torch.stack(seen).sum())
    with pytest.raises(ValueError, match="take it once"):
        take_auxiliary_loss(model)
    model(tokens), model(tokens)  # gradient accumulation: two calls, one sum
    assert_close(take_auxiliary_loss(model), torch.stack(seen[2:]).sum())
    with torch.no_grad():
        model(tokens)
    model.eval()(tokens)
    assert all(layer.auxiliary is None for layer in mixtures(model))  # neither keeps a graph alive


def test_a_decoder_needs_a_layer_to_replace():
    for every in (0, 5):
        with pytest.raises(ValueError, match=f"every={every} must be 1 to 4"):
            replace_feed_forward(decoder(), Switch(n_experts=2), every=every)
