"""Rows of a cache: rounding by hand, bytes by arithmetic, and attention that holds them packed."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.qat.cache_rows import RowAttention, pack_rows, round_rows, unpack_rows
from refimpl.compression.quantization.qat.llm_qat import LLMQAT
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from tests.compression.conftest import decoder


def test_rows_by_hand():
    """Oracle: by hand: steps of 1 and of 10; the gradient goes straight through."""
    x = torch.tensor([[7.0, -3.4, 0.6], [70.0, 34.0, -6.0]], requires_grad=True)
    y = round_rows(x, 4)
    assert y.tolist() == [[7.0, -3.0, 1.0], [70.0, 30.0, -10.0]]
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_the_rounded_rows(bits, dtype, generator):
    """Oracle: rounding without packing, also of what is rounded already; bytes by arithmetic."""
    x = torch.randn(2, 3, 20, generator=generator).to(dtype)
    x[0, 0] = 0
    rows = pack_rows(x, bits)
    assert rows.shape == (2, 3, 3 * bits + 4) and rows.dtype == torch.uint8
    assert torch.equal(unpack_rows(rows, bits, 20, dtype), round_rows(x, bits))
    again = pack_rows(round_rows(x, bits), bits)
    assert_close(unpack_rows(again, bits, 20, dtype), round_rows(x, bits))


def converted(model, **settings):
    method = LLMQAT(**settings)
    return method.convert(method.prepare(model))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_packed_cache_computes_what_reading_at_once_does(qk_norm, generator, tokens):
    """Oracle: one forward without a cache, which rounds and packs nothing; padding, windows, norms of keys."""
    config = Config(
        vocabulary=61,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=40,
        qk_norm=qk_norm,
        sliding_window=(None, 4),
    )
    small = converted(initialize_(Decoder(config), generator, std=0.3), activation_bits=None)
    assert all(type(block.attention) is RowAttention for block in small.layers)
    padding = torch.tensor([0, 3, 1])
    with torch.no_grad():
        whole = small(tokens, padding=padding)
        cache = FullCache(config.sliding_window)
        parts = [
            small(tokens[:, :6], cache, padding),
            *(small(tokens[:, i : i + 1], cache, padding) for i in range(6, 11)),
        ]
    assert_close(torch.cat(parts, dim=1)[:, 3:], whole[:, 3:], rtol=1e-3, atol=1e-3)  # a code may become its neighbour
    generate(small, tokens, 3)


def test_bytes_of_the_cache(tokens):
    """Oracle: arithmetic: for 4 blocks, keys and values, 3 rows and 11 tokens: 16 numbers of 4 bits and a scale of 4 bytes."""
    small, cache = converted(decoder()), FullCache(reserve=11)
    with torch.no_grad():
        small(tokens, cache)
    assert cache.nbytes == 4 * 2 * 3 * 11 * (16 // 2 + 4)


def test_what_the_cache_holds_matters(tokens):
    """Oracle: negative control: with 2 bits the logits are others than with 8; without `kv_bits` attention is left alone."""
    with torch.no_grad():
        coarse, fine = (converted(decoder(), kv_bits=bits)(tokens, FullCache()) for bits in (2, 8))
    assert (coarse - fine).norm() > 0.1 * fine.norm()
    assert not any(isinstance(module, RowAttention) for module in converted(decoder(), kv_bits=None).modules())
