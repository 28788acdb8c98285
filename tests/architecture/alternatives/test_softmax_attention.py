"""Softmax attention as a mixer: transformers' attention, by hand, and the state that grows."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.alternatives.protocol import state_bytes
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention


def test_equals_llamas_attention(generator):
    """Oracle: transformers' LlamaAttention (5.23) with the same weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8)
    config._attn_implementation = "eager"
    peer, mixer = LlamaAttention(config, 0).eval(), SoftmaxAttention(head_dim=8).build(32, generator)
    x = torch.randn(2, 9, 32, generator=generator)
    with torch.no_grad():
        for name, weight in zip("qkv", mixer.qkv_proj.weight.mul_(4).chunk(3), strict=True):
            getattr(peer, f"{name}_proj").weight.copy_(weight)
        peer.o_proj.weight.copy_(mixer.out_proj.weight)
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        turns = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
        theirs = peer(x, position_embeddings=turns, attention_mask=mask)[0]
        assert_close(mixer(x), theirs)
        still = peer(x, position_embeddings=[turns[0] * 0 + 1, turns[1] * 0], attention_mask=mask)[0]
    assert (theirs - still).abs().max() > 0.01  # negative control: positions matter


def test_the_first_position_returns_its_own_value(generator):
    """Oracle: by hand. With one position the softmax is 1, so y = W_out W_v x."""
    mixer, x = SoftmaxAttention(head_dim=4).build(8, generator), torch.randn(1, 1, 8, generator=generator)
    assert_close(mixer(x), x @ mixer.qkv_proj.weight[16:].T @ mixer.out_proj.weight.T)


def test_the_state_holds_keys_and_values(generator):
    """Oracle: by hand, 2 * positions * width * 4 bytes a row."""
    mixer = SoftmaxAttention(head_dim=4).build(8, generator)
    _, state = mixer.extend(torch.ones(3, 7, 8), mixer.initial_state(3))
    assert state_bytes(state) == 3 * 2 * 7 * 8 * 4 and not mixer.constant_state


@pytest.mark.parametrize("head_dim", [0, 3])
def test_settings_are_checked(head_dim):
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be even"):
        SoftmaxAttention(head_dim=head_dim)
    with pytest.raises(ValueError, match="d_model=12 must be a multiple"):
        SoftmaxAttention(head_dim=8).build(12)
