"""Keys, values and their squared gradients: differences of the loss, the layer by hand, nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.inference.kv_cache.quantized.sensitivity import sensitivities
from tests.inference.kv_cache.decoders import decoder

TEXTS = [torch.arange(11) * 5 % 61, torch.arange(7)]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_gradients_by_differences(name, qk_norm):
    """Oracle: the loss with one number of the layer's output moved up and down, in float64."""
    model, text = decoder(qk_norm=qk_norm, head_dim=8), TEXTS[0]
    attention = model.layers[0].attention
    module = attention.k_norm if name == "k_proj" and qk_norm else getattr(attention, name)
    layer = sensitivities(model, [text])[0]
    weights = layer.key_weights if name == "k_proj" else layer.value_weights

    def loss(token, channel, by):
        def move(_, __, output):
            moved = output.clone()
            moved.view(len(text), -1)[token, channel] += by
            return moved

        hook = module.register_forward_hook(move)
        found = F.cross_entropy(model(text[None])[0, :-1], text[1:])
        hook.remove()
        return float(found)

    for token, channel in ((0, 3), (4, 15), (9, 8), (10, 0)):
        slope = (loss(token, channel, 1e-5) - loss(token, channel, -1e-5)) / 2e-5
        assert weights[token, channel] == pytest.approx(slope**2, rel=1e-3, abs=1e-12)
    assert weights[:10].max() > 1e-4
    assert not weights[
        10
    ].any()  # the last token's key and value are seen by its own prediction alone, which counts not


def test_keys_and_values_of_the_first_layer_by_hand():
    """Oracle: the projections of the normalized embedding, texts one after the other without their first two tokens."""
    model = decoder()
    layer, block = sensitivities(model, TEXTS, skip=2)[0], model.layers[0]
    x = torch.cat([block.attention_norm(model.embedding(text[2:])) for text in TEXTS])
    assert_close(layer.keys, block.attention.k_proj(x).float())
    assert_close(layer.values, block.attention.v_proj(x).float())


def test_nothing_is_left_behind():
    """Oracle: the model before: weights, gradients, hooks; those that train keep their gradients."""
    model = decoder().requires_grad_(True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.layers[0].attention.k_proj.weight.grad = torch.ones_like(model.layers[0].attention.k_proj.weight)
    with torch.no_grad():
        sensitivities(model, TEXTS)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [name for name, x in model.named_parameters() if x.grad is not None] == ["layers.0.attention.k_proj.weight"]
    assert model.layers[0].attention.k_proj.weight.grad.unique().tolist() == [1]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("texts", "skip", "message"),
    [
        ([], 0, "texts is empty"),
        ([torch.arange(5), torch.arange(1)], 0, r"texts\[1\] of shape \(1,\) must be \[time\], with at least 2 tokens"),
        ([torch.arange(3)], 3, "with at least 4 tokens"),
        ([torch.arange(6).view(2, 3)], 0, r"texts\[0\] of shape \(2, 3\)"),
    ],
)
def test_texts_are_checked(texts, skip, message):
    with pytest.raises(ValueError, match=message):
        sensitivities(decoder(), texts, skip)


def test_gradients_that_are_not_finite_are_refused():
    model = decoder()
    model.layers[1].attention.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0: keys, values or their gradients are not finite"):
        sensitivities(model, TEXTS)
