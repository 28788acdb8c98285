"""Transformers' quantized cache as a rival: what it gives back, and what it holds."""

import pytest
import torch

from refimpl.model.config import Config

CONFIG = Config(vocabulary=2, d_model=64, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=32, d_ff=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_scales_and_zeros_are_counted(bits, generator):
    """Oracle: arithmetic: so many bits a number, and two of 16 for each group of 32; the next token as it came."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not among the test's dependencies")
    from tools.quanto_cache import QuantoCache  # it imports much that warns

    cache = QuantoCache(bits=bits).cache(CONFIG)
    k, v = torch.randn(2, 1, 2, 64, 32, generator=generator).bfloat16()
    cache.update(0, k, v)
    token = torch.randn(1, 2, 1, 32, generator=generator).bfloat16()
    keys, _, _ = cache.update(0, token, token)
    assert cache.length == 65 and keys.shape == (1, 2, 65, 32)
    assert 0 < (keys[:, :, :64] - k).abs().max() < 2 * k.abs().max() / (2**bits - 1)
    assert cache.nbytes == 2 * 2 * 32 * (64 * (bits + 32 / 32) / 8 + 2)


@pytest.mark.filterwarnings("ignore")
def test_without_the_package_it_says_what_is_missing():
    from tools.quanto_cache import QuantoCache

    if not pytest.importorskip("transformers").utils.is_optimum_quanto_available():
        with pytest.raises(ImportError, match="optimum-quanto"):
            QuantoCache().cache(CONFIG)
    assert QuantoCache.ARENA == {"bits": [2, 4]}
