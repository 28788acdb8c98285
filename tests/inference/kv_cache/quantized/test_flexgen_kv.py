"""FlexGen's cache: logits by the official rule in a NumPy loop, bytes by formula, claims."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.quantized.flexgen_kv import FlexGenKV
from refimpl.model.cache import FullCache
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.quantized.rebuilt import Rebuilt, plain

TOKENS = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(3))


def by_token(bits, group):
    """Every token before this call is quantized: groups within each head's channels, for keys and values alike."""

    def rebuild(k, v, calls):
        for x in (k, v):
            for first in range(0, x.shape[3], group):
                piece = x[..., first : first + group]
                rows = plain(piece.reshape(-1, piece.shape[3]).numpy().copy(), bits)
                piece.copy_(torch.from_numpy(rows).view(piece.shape))
        return k, v

    return Rebuilt(rebuild)


@pytest.mark.parametrize(
    ("bits", "group", "head_dim", "kv_heads"), [(4, 64, 8, 2), (4, 4, 8, 1), (2, 8, 12, 4), (3, 5, 12, 2)]
)
@pytest.mark.parametrize("sizes", [[1] * 30, [16] + [1] * 14, [8, 9, 13]])
def test_logits_by_the_official_rule(bits, group, head_dim, kv_heads, sizes):
    """Oracle: all that was seen, quantized anew at each call by a loop in NumPy; the prompt and the new tokens are exact."""
    method, model = FlexGenKV(bits=bits, group_size=group), decoder(head_dim=head_dim, n_kv_heads=kv_heads)
    expected = run(model, TOKENS, by_token(bits, group), sizes)
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.02  # negative control
    assert_close(expected[:, : sizes[0]], model(TOKENS)[:, : sizes[0]])


def test_by_hand():
    """Oracle: by hand: a token of channels 0 to 15 and 0 to 30 in two groups, in steps of 1 and of 2: 3 becomes 4 of the latter (ties to even)."""
    config = shape(head_dim=32, n_kv_heads=1, n_heads=1)
    first, second = torch.arange(16.0), torch.arange(16.0) * 2
    second[1] = 3.0
    x = torch.cat([first, second]).view(1, 1, 1, 32)
    cache = FlexGenKV(group_size=16).cache(config)
    cache.update(0, x, x, x, torch.zeros(1, 1, dtype=torch.int64))
    k, v, positions = cache.update(0, x + 0.5, x + 0.5, x, torch.ones(1, 1, dtype=torch.int64))
    second[1] = 4.0
    assert k[0, 0, 0].tolist() == v[0, 0, 0].tolist() == [*first.tolist(), *second.tolist()]
    assert torch.equal(k[:, :, 1:], x + 0.5)
    assert positions is None


def ratio(method, head_dim=64, tokens=1000):
    """16 bits over the bits held, for one prompt in bfloat16."""
    config = shape(n_kv_heads=1, n_heads=1, head_dim=head_dim)
    x = torch.randn(1, 1, tokens, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = method.cache(config)
    cache.update(0, x, x, x, torch.arange(tokens)[None])
    return 2 * x.nbytes / cache.nbytes


@pytest.mark.parametrize(
    ("bits", "group", "head_dim"), [(4, 64, 64), (4, 64, 128), (2, 32, 64), (4, 64, 32), (8, 16, 80)]
)
def test_bytes_by_formula(bits, group, head_dim):
    """Oracle: arithmetic: codes of `bits` and 32 bits a group, of which a head has as many as it takes, whatever the number of tokens."""
    groups = -(-head_dim // group)
    for tokens in (1, 1000):
        found = ratio(FlexGenKV(bits=bits, group_size=group), head_dim, tokens)
        assert found == pytest.approx(16 * head_dim / (bits * head_dim + 32 * groups), rel=1e-12)


def test_decoding_quantizes(generator):
    """Oracle: a prompt of the same tokens: the same numbers, and a sixteenth of room at most."""
    config = shape()
    k, v = draw(generator, config, 301)
    one, other = FlexGenKV().cache(config), FlexGenKV().cache(config)
    *_, found = feed(one, config, k, v, [1] * 301)
    *_, _ = feed(other, config, k, v, [301])
    assert other.nbytes <= one.nbytes < 17 / 16 * other.nbytes
    last = torch.zeros(1, 2, 1, 32)
    assert torch.equal(found[1][:, :, :300], other.update(0, last, last, last, torch.tensor([[301]]))[1][:, :, :300])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"bits": 16}, "bits=16 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        FlexGenKV(**change)


def test_a_value_beyond_16_bits_is_refused():
    cache, x = FlexGenKV().cache(shape()), torch.full((1, 2, 3, 32), 1e7)
    with pytest.raises(ValueError, match="do not fit a grid"):
        cache.update(0, x, x, x, torch.arange(3)[None])


# Claims


def test_claim_error_bound(claim, generator):
    """Largest error of any number of the cache, in steps of its own group."""
    config, worst = shape(head_dim=64), 0.0
    k, v = draw(generator, config, 257, dtype=torch.float64)
    cache = FlexGenKV().cache(config)
    exact = next(feed(FullCache(), config, k, v, [257]))
    *_, found = feed(cache, config, k, v, [256, 1])
    for held, x, y in zip(cache._layers[0][0].held, exact, found, strict=False):
        steps = (y - x)[:, :, :256].abs() / held.scale.all().double()[:, :, :256]
        worst = max(worst, float(steps.max()))
    claim("flexgen-kv", "error-bound", worst)


def test_claim_compression(claim):
    claim("flexgen-kv", "compression", ratio(FlexGenKV(), 128, 10_000))


def test_claim_groups_of_32(claim):
    claim("flexgen-kv", "groups-of-32", ratio(FlexGenKV(group_size=32), 128, 10_000))


def test_claims_negligible_loss(claim):
    """Held-out text in windows of 256, read in chunks of 32, so that most of what attention sees is quantized."""
    model = testbed.load()[0].requires_grad_(False)
    tokens = testbed.corpus.tokens("held-out", 8 * 256).view(8, 256)
    following = tokens[:, 1:].flatten()
    exact, ours = (
        run(model, tokens, cache, 32)[:, :-1].flatten(0, 1) for cache in (FullCache(), FlexGenKV().cache(model.config))
    )
    right = [(logits.argmax(dim=-1) == following).double().mean() for logits in (exact, ours)]
    claim("flexgen-kv", "negligible-loss", float(right[0] - right[1]))
    losses = [F.cross_entropy(logits.double(), following) for logits in (exact, ours)]
    claim("flexgen-kv", "negligible-loss-in-perplexity", float((losses[1] - losses[0]).exp()))
