"""KIVI: the official residual rules against a loop in NumPy, bytes by formula, claims."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.quantized.groups import dequantize, quantize
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.model.cache import FullCache
from tests.inference.kv_cache.answers import right
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.quantized.rebuilt import plain


class Rebuilt:
    """What attention sees by the official rules, from all exact keys and values: a cache that quantizes anew at every call."""

    def __init__(self, method):
        self.method, self.past = method, {}

    @property
    def length(self):
        return max((k.shape[2] for k, _ in self.past.values()), default=0)

    def update(self, layer, k, v, queries, positions):
        old_k, old_v = self.past.get(layer, (k[:, :, :0], v[:, :, :0]))
        self.past[layer] = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        n, group, residual = old_k.shape[2], self.method.group_size, self.method.residual_length
        seen_k, seen_v = (x.clone() for x in self.past[layer])
        for row in range(k.shape[0]):
            for head in range(k.shape[1]):
                for first in range(0, n - n % residual, group):  # keys: the whole residuals before this call
                    block = seen_k[row, head, first : first + group]
                    block[:] = torch.from_numpy(plain(block.T.numpy().copy(), self.method.bits).T.copy())
                for token in range(max(0, n - residual)):  # values: all but the last residual
                    groups = seen_v[row, head, token].view(-1, group)
                    groups[:] = torch.from_numpy(plain(groups.numpy().copy(), self.method.bits))
        return seen_k, seen_v, None


@pytest.mark.parametrize(("bits", "group", "residual"), [(2, 4, 8), (4, 8, 8), (3, 4, 12)])
@pytest.mark.parametrize("sizes", [[1] * 30, [16] + [1] * 14, [19, 5] + [1] * 6, [8, 9, 13]])
def test_logits_by_the_official_rules(bits, group, residual, sizes):
    """Oracle: all that was seen, quantized anew at each call by a loop in NumPy, in a decoder with an ordinary past."""
    method, model = KIVI(bits=bits, group_size=group, residual_length=residual), decoder(head_dim=8)
    tokens = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(3))
    expected = run(model, tokens, Rebuilt(method), sizes)
    assert_close(run(model, tokens, method.cache(model.config), sizes), expected)
    assert (expected - model(tokens)).abs().max() > 0.1  # negative control


def test_a_sliding_window_layer_holds_all_and_sees_its_window():
    """Oracle: the same loop, whose keys and values a layer with a window of 6 masks itself."""
    method = KIVI(bits=2, group_size=4, residual_length=8)
    model, cache = decoder(head_dim=8, sliding_window=(6, None)), method.cache(shape(head_dim=8))
    tokens = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(3))
    expected = run(model, tokens, Rebuilt(method), [16] + [1] * 14)
    assert_close(run(model, tokens, cache, [16] + [1] * 14), expected)
    assert (expected - run(decoder(head_dim=8), tokens, Rebuilt(method), [16] + [1] * 14)).abs().max() > 0.1


@pytest.mark.parametrize("n", [5, 8, 9, 15, 16, 17, 40])
def test_what_is_exact(n, generator):
    """Oracle: by hand: after n tokens the last n mod 8 keys and the last 8 values are as they came, nothing older is."""
    config = shape(head_dim=8)
    k, v = draw(generator, config, n + 1)
    method = KIVI(group_size=4, residual_length=8)
    for sizes in ([n, 1], [1] * (n + 1)):
        cache = method.cache(config)
        *_, (found_k, found_v, _) = feed(cache, config, k, v, sizes)
        exact = (found_v == v).all(dim=(0, 1, 3))
        assert exact.tolist() == [token >= n - 8 for token in range(n + 1)]
        exact_k = (torch.linalg.vector_norm(found_k, dim=-1) - torch.linalg.vector_norm(k, dim=-1)).abs().amax(
            dim=(0, 1)
        ) < 1e-5
        assert exact_k.tolist() == [token >= n - n % 8 for token in range(n + 1)]


def test_first_call_is_exact():
    """Oracle: the model without a cache: a prompt is read with full precision, and quantized after."""
    model = decoder()
    tokens = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(3))
    cache = KIVI(residual_length=32).cache(model.config)
    assert torch.equal(model(tokens, cache), model(tokens))


def ratio(bits, tokens):
    """16 bits over the bits held, for one prompt of so many tokens, in bfloat16."""
    config = shape(n_kv_heads=1, n_heads=1)
    x = torch.randn(1, 1, tokens, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = KIVI(bits=bits).cache(config)
    cache.update(0, x, x, x, torch.arange(tokens)[None])
    return 2 * x.nbytes / cache.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_by_formula(bits):
    """Oracle: arithmetic: codes of `bits`, 32 bits a group of 32, 16 bits for 10,000 mod 128 = 16 keys and for 128 values."""
    held = (9984 + 9872) * (bits + 1) + (16 + 128) * 16
    assert ratio(bits, 10_000) == pytest.approx(20_000 * 16 / held, rel=1e-12)
    assert ratio(bits, 100) == 1.0


def test_decoding_quantizes(generator):
    """Oracle: a prompt of the same tokens; the room is a sixteenth at most. Nothing stays exact but the residual."""
    config = shape()
    k, v = draw(generator, config, 1000)
    one, other = KIVI().cache(config), KIVI().cache(config)
    for _ in feed(one, config, k, v, [1] * 1000):
        pass
    for _ in feed(other, config, k, v, [1000]):
        pass
    assert other.nbytes <= one.nbytes < 17 / 16 * other.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"residual_length": 48}, "residual_length=48 must be a multiple of group_size=32"),
        ({"residual_length": 0}, "residual_length=0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**change)


def test_a_head_that_groups_do_not_fill_is_refused():
    """As the official code, whose value groups lie within a head."""
    with pytest.raises(ValueError, match="group_size=32 must divide head_dim=48"):
        KIVI().cache(shape(head_dim=48))


# Claims


def rounded(x, dim):
    """x in 2 bits and back, in groups of 32 along a dimension."""
    groups = x.unflatten(dim, (-1, 32))
    return dequantize(*quantize(groups, dim + 1, 2), torch.empty_like(groups)).flatten(dim, dim + 1)


def test_claim_error_bound(claim, generator):
    """Largest error of any number of the cache, in steps of its own group, 2 and 4 bits."""
    config, worst = shape(), 0.0
    k, v = draw(generator, config, 257, dtype=torch.float64)
    for bits in (2, 4):
        cache = KIVI(bits=bits, residual_length=32).cache(config)
        exact, *_ = [x[0] for x in feed(KIVI(residual_length=512).cache(config), config, k, v, [257])]
        *_, (found_k, found_v, _) = feed(cache, config, k, v, [256, 1])
        layer = cache._layers[0][0]
        steps = layer.keys.scale.all().double(), layer.values.scale.all().double()
        error_k = (found_k - exact)[:, :, :256].unflatten(2, (-1, 32)).abs() / steps[0]
        error_v = (found_v - v)[:, :, :224].unflatten(3, (-1, 32)).abs() / steps[1][:, :, :224]
        worst = max(worst, float(error_k.max()), float(error_v.max()))
    claim("kivi", "error-bound", worst)


@pytest.mark.parametrize(("name", "bits"), [("two-bit-compression", 2), ("four-bit-compression", 4)])
def test_claim_compression(claim, name, bits):
    """The least ratio while the keys' residual fills and empties once, from 10,000 tokens on."""
    claim("kivi", name, min(ratio(bits, 10_000 + more) for more in (0, 56, 111, 112)))


def test_claim_four_bits_save_three_quarters(claim):
    claim("kivi", "four-bits-save-three-quarters", 1 - 1 / ratio(4, 10_000))


def test_claim_four_bits_cost_little(claim):
    """Answers of the testbed's model with the prompt's keys and values in 4 bits, against all of it in 16."""
    exact, ours = right(lambda config, _: FullCache()), right(lambda config, _: KIVI(bits=4).cache(config))
    claim("kivi", "four-bits-cost-little", 1 - ours / exact)


def test_claim_exact_window(claim, generator):
    """Decode three residuals of tokens; what is exact between two steps is counted in what the second returns."""
    config = shape()
    k, v = draw(generator, config, 512)
    cache, exact_keys, exact_values = KIVI().cache(config), [], []
    whole, _, _ = next(feed(KIVI(residual_length=1024).cache(config), config, k, v, [512]))
    for found_k, found_v, _ in feed(cache, config, k, v, [128] + [1] * 384):
        n = found_k.shape[2]
        exact_keys.append(int((found_k == whole[:, :, :n]).all(dim=(0, 1, 3)).sum()) - 1)  # the new token is one
        exact_values.append(int((found_v == v[:, :, :n]).all(dim=(0, 1, 3)).sum()) - 1)
    assert exact_values[1:] == [128] * 384
    claim("kivi", "exact-window", sum(exact_keys[1:]) / sum(exact_values[1:]))


def test_claim_keys_per_channel(claim, generator):
    """Keys with 3 of 32 channels 8 times as large in every token; the paper's error of attention weights, of random queries."""
    k, q = torch.randn(256, 32, generator=generator), torch.randn(64, 32, generator=generator)
    k[:, [3, 11, 26]] = 8 * k[:, [3, 11, 26]].sign() + k[:, [3, 11, 26]]
    weights = (q @ k.T / 32**0.5).softmax(dim=-1)
    distance = [float((1 - (q @ rounded(k, dim).T / 32**0.5).softmax(dim=-1) / weights).norm()) for dim in (0, 1)]
    claim("kivi", "keys-per-channel", distance[0] / distance[1])


def test_claim_values_per_token(claim, generator):
    """Attention rests on 8 of 256 tokens, whose values are a tenth of the others'."""
    v, scores = torch.randn(256, 32, generator=generator), torch.zeros(64, 256)
    heavy = torch.randperm(256, generator=generator)[:8]
    v[heavy] /= 10
    scores[:, heavy] = 8 + torch.randn(64, 8, generator=generator)
    weights = scores.softmax(dim=-1)
    distance = [float((weights @ (rounded(v, dim) - v)).norm()) for dim in (1, 0)]
    claim("kivi", "values-per-token", distance[0] / distance[1])
