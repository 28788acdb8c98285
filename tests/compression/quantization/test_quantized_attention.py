"""Attention with a cache of few bits: rows by hand, bytes by formula, and caches that hold what they are given."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.hadamard import turn
from refimpl.compression.quantization.quantized_attention import QuantizedAttention, pack_rows, unpack_rows
from refimpl.model.cache import FullCache
from tests.compression.conftest import decoder


def rounded(bits):
    """The decoder in float64, its keys and values in so many bits: what differs in a last place should not round to another level."""
    model = decoder().double()
    for layer in model.layers:
        layer.attention = QuantizedAttention.of(layer.attention, bits)
    return model


def test_rows_worked_by_hand():
    """Oracle: by hand. [-15, 15] times 0.95 in 15 steps of 1.9, in float16 1.9004; the zero point is round(14.25 / 1.9004) = 7."""
    x = torch.tensor([[-15.0, 15.0, 0.0, 1.8, -1.8, 3.9, 14.0, -13.0]])
    rows = pack_rows(x, 4)
    assert rows.shape == (1, 4 + 2 + 1) and rows.dtype == torch.uint8
    found = unpack_rows(rows, 4, 8, torch.float32)
    levels = (found / found[0, 3]).round().tolist()
    assert levels == [[-7.0, 8.0, 0.0, 1.0, -1.0, 2.0, 7.0, -7.0]]
    assert abs(float(found[0, 3]) - 1.9) < 0.002


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [8, 5, 128, 256])
def test_rows_are_within_half_a_step(bits, dim, generator):
    """Oracle: a theorem. What is inside of the clipped range moves by half a step at most (a zero point's rounding adds one half)."""
    x = torch.randn(3, 2, dim, generator=generator)
    rows = pack_rows(x, bits)
    groups = 2 if dim == 256 else 1
    assert rows.shape[-1] == groups * (-(-(dim // groups) // 8) * bits + 3)
    found = unpack_rows(rows, bits, dim, torch.float32)
    grouped, near = (y.view(-1, dim // groups) for y in (x, found))
    low, high = 0.95 * grouped.amin(1, keepdim=True).clamp(max=0), 0.95 * grouped.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    assert ((near - grouped.clamp(low, high)).abs() <= step * 1.01).all()
    assert not torch.equal(near, grouped)


def test_a_full_cache_holds_packed_rows(tokens, logits):
    """Oracle: bytes by hand, and the logits without a cache: each token is rounded once, whenever it is read."""
    small = rounded(4)
    cache = FullCache()
    with torch.no_grad():
        parts = [small(tokens[:, :6], cache), small(tokens[:, 6:7], cache), small(tokens[:, 7:], cache)]
    assert_close(torch.cat(parts, dim=1), logits(small, tokens))
    held = sum(layer.k[:, :, :11].numel() + layer.v[:, :, :11].numel() for layer in cache._layers.values())
    assert held == 4 * 2 * 3 * 11 * 2 * (4 + 3)  # layers, keys and values, rows, tokens, heads, bytes of 8 channels
    assert next(iter(cache._layers.values())).k.dtype == torch.uint8


def test_what_the_cache_holds_are_turned_keys(tokens):
    """Oracle: the decoder's own keys and values, keys turned by hand; packed in 8 bits they differ by what is clipped."""
    cache, whole = FullCache(), FullCache()
    with torch.no_grad():
        rounded(8)(tokens, cache)
        decoder().double()(tokens, whole)
    held, own = cache._layers[0], whole._layers[0]
    keys, values = (unpack_rows(rows[:, :, :11], 8, 8, torch.float64) for rows in (held.k, held.v))
    for found, expected in ((keys, turn(own.k[:, :, :11])), (values, own.v[:, :, :11])):
        assert 0 < (found - expected).norm() / expected.norm() < 0.06
    assert (keys - own.k[:, :, :11]).norm() > 0.5 * keys.norm()  # negative control


def test_another_cache_gets_the_rounded_values(tokens, logits):
    """Oracle: the logits without a cache. What it is given are keys as they came, near the model's own."""

    class Other(FullCache):
        pass

    small, other, whole = rounded(8), Other(), FullCache()
    with torch.no_grad():
        found = small(tokens, other)
        decoder()(tokens, whole)
    assert_close(found, logits(small, tokens))
    k, original = other._layers[0].k, whole._layers[0].k
    assert k.dtype == torch.float64 and 0 < (k - original).norm() / original.norm() < 0.06


def test_keys_are_rounded_turned(generator):
    """Oracle: second route. A key with one large channel loses less when it is turned first."""
    k = torch.randn(200, 32, generator=generator)
    k[:, 5] *= 30
    plain = unpack_rows(pack_rows(k, 4), 4, 32, torch.float32)
    back = turn(unpack_rows(pack_rows(turn(k), 4), 4, 32, torch.float32), back=True)
    rest = torch.arange(32) != 5
    assert (back - k)[:, rest].norm() < 0.6 * (plain - k)[:, rest].norm()


def test_bits_bring_attention_nearer(tokens, logits):
    """Oracle: the decoder; its own attention is left as it was."""
    whole = logits(decoder(), tokens)
    errors = [(logits(rounded(bits), tokens) - whole).norm() / whole.norm() for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0 and errors[2] < 0.25  # the clipping's part
