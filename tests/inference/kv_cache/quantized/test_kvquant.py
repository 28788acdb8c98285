"""KVQuant: the official rules in NumPy with rotations as complex numbers, calibration, rotations, bytes, padding, claims."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.quantized.kvquant import KVQuant, _Layer, side_by_side, span
from refimpl.inference.kv_cache.quantized.levels import Levels, nearest, normal_levels
from refimpl.inference.kv_cache.quantized.sensitivity import sensitivities
from refimpl.model.cache import FullCache
from refimpl.model.config import Rope
from refimpl.model.rope import Rotary, rotate
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.quantized.rebuilt import Rebuilt, half

TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))
TEXTS = [torch.randint(0, 61, (30,), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def turns(config, count):
    """Each position's rotation as complex numbers of the model's single-precision cosines and sines, `[count, head_dim / 2]`."""
    cos, sin = Rotary(config)(torch.arange(count)[None], torch.float64)
    pairs = config.head_dim // 2
    return (cos[0, 0, :, :pairs] + 1j * sin[0, 0, :, pairs:]).numpy()


def coded(vector, encode, decode, width, middle):
    """Each number by its nearest level, by distance."""
    codes = np.abs(((vector - middle) / width)[:, None] - encode).argmin(axis=1)
    return decode[codes] * width + middle


def with_outliers(vector, rounded, places):
    """What outliers lack is added in half precision."""
    rounded[places] += half((vector - rounded)[places])
    return rounded


def by_the_rules(method, config):
    """All before this call but the sinks, quantized by the official rules; a cache, and how many keys were outliers in all."""
    apart, done = [], {}

    def key(vector, levels, width, middle, count):
        shares = (vector - middle) / width
        order = np.argsort(shares, kind="stable")
        places = [i for i in [*order[:count], *order[len(order) - count :]] if abs(shares[i]) > 1]
        apart.append(len(places))
        return with_outliers(vector, coded(vector, *levels, width, middle), places)

    def value(vector, levels, count):
        order = np.argsort(vector, kind="stable")
        places = [*order[:count], *order[len(order) - count :]]
        inside = np.delete(vector, places)
        width = half((inside.max() - inside.min()) / 2)
        middle = half((inside.max() + inside.min()) / 2)
        return with_outliers(vector, coded(vector, *levels, width, middle), places)

    def levels(layer, of):
        if method.calibration is None:
            return [normal_levels(method.bits).double().numpy()] * 2
        return [x.double().numpy() for x in getattr(method.calibration[layer], of)]

    def rebuild(layer, k, v):
        rows, heads, n, dim = k.shape
        count = math.ceil(heads * dim * Fraction(str(method.outliers)) / 2)
        spin = turns(config, n)[:, None]
        for row in range(rows):
            keys, values = (x[row].transpose(0, 1).numpy() for x in (k, v))  # views [n, heads, dim]
            raw = (keys[..., : dim // 2] + 1j * keys[..., dim // 2 :]) / spin
            raw = np.concatenate([raw.real, raw.imag], axis=-1).reshape(n, -1)
            if method.calibration is None:
                if n - method.sinks < method.warmup:
                    continue
                seen = raw[method.sinks : method.sinks + method.warmup]
                low, high = (
                    np.percentile(seen, 100 * q, axis=0) for q in (method.outliers / 2, 1 - method.outliers / 2)
                )
                width, middle = (high - low) / 2, (high + low) / 2
            else:
                width, middle = (x.double().numpy().ravel() for x in method.calibration[layer][:2])
            for t in range(method.sinks, n):
                if (layer, row, t) not in done:  # what is rebuilt at every call is the same past
                    done[layer, row, t] = (
                        key(raw[t], levels(layer, "keys"), width, middle, count),
                        value(values[t].ravel(), levels(layer, "values"), count),
                    )
                found = done[layer, row, t][0].reshape(heads, -1)
                turned = (found[:, : dim // 2] + 1j * found[:, dim // 2 :]) * spin[t]
                keys[t] = np.concatenate([turned.real, turned.imag], axis=-1)
                values[t] = done[layer, row, t][1].reshape(heads, -1)
        return k, v

    caches = [Rebuilt(lambda k, v, _, layer=layer: rebuild(layer, k, v)) for layer in range(config.n_layers)]
    return caches, apart


class Layers:
    """One cache for each layer."""

    def __init__(self, caches):
        self.caches = caches

    @property
    def length(self):
        return self.caches[0].length

    def update(self, layer, *given):
        return self.caches[layer].update(layer, *given)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("settings", "kv_heads", "rope"),
    [
        ({"bits": 3, "outliers": 0.2, "warmup": 9}, 2, Rope(theta=500.0)),
        ({"bits": 2, "outliers": 0.0, "sinks": 0, "warmup": 5}, 1, Rope(type="linear", factor=3.0)),
        ({"bits": 4, "sinks": 3, "warmup": 12}, 2, Rope(type="yarn", factor=4.0, original_max_positions=16)),
    ],
)
def test_logits_by_the_official_rules(settings, kv_heads, rope, calibrated):
    """Oracle: keys turned back by complex division, ranges, levels by distance and outliers in loops in NumPy; decoding and prompts alike."""
    model = decoder(head_dim=8, n_kv_heads=kv_heads, rope=rope)
    method = KVQuant(**settings).calibrated(model, TEXTS) if calibrated else KVQuant(**settings)
    sizes = [1, 2, 17, 20] if calibrated else [20] + [1] * 20
    caches, apart = by_the_rules(method, model.config)
    expected = run(model, TOKENS, Layers(caches), sizes)
    assert_close(
        run(model, TOKENS, method.cache(model.config), sizes), expected, rtol=1e-5, atol=1e-5
    )  # grids in float32
    assert (expected - model(TOKENS)).abs().max() > 0.05  # negative control
    assert (sum(apart) > 0) == (method.outliers > 0)


def test_the_first_token_is_exact_and_the_prompt_is_read_exactly():
    """Oracle: the model without a cache, and the keys and values handed over."""
    model, config = decoder(), shape()
    assert torch.equal(model(TOKENS, KVQuant(warmup=2).cache(config)), model(TOKENS))
    k, v = draw(torch.Generator().manual_seed(0), config, 90)
    cache, full = KVQuant(sinks=2).cache(config), FullCache()
    *_, found = feed(cache, config, k, v, [1] * 90)
    *_, exact = feed(full, config, k, v, [1] * 90)
    for x, y in zip(found[:2], exact[:2], strict=True):
        assert (x == y).all(dim=(0, 1, 3)).nonzero().flatten().tolist() == [0, 1, 89]


@pytest.mark.parametrize("type", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_are_turned_back_exactly(type, dtype, generator):
    """Oracle: the keys before the decoder turned them; a rounding of their dtype remains, at position 1,000 as at 1."""
    config = shape(rope=Rope(theta=500.0, type=type, factor=4.0, original_max_positions=32))
    k = torch.randn(1, 2, 1000, 32, generator=generator).to(dtype)
    turned = rotate(k, *Rotary(config)(torch.arange(1000)[None], dtype))
    layer = KVQuant().cache(config)._new(0)
    error = (layer._turned_back(turned, 0) - side_by_side(k)).abs().amax(dim=(0, 1, 3))
    assert error[[1, 999]].max() < 16 * torch.finfo(dtype).eps
    assert (layer._turned_back(turned, 1) - side_by_side(k)).abs().max() > 0.5  # negative control


def test_calibration_by_hand():
    """Oracle: percentiles of the first layer's keys by NumPy, the projections of the normalized embedding, without first tokens."""
    model = decoder(head_dim=8)
    grid = KVQuant(bits=3, outliers=0.1).calibrated(model, TEXTS).calibration[0]
    block = model.layers[0]
    x = block.attention_norm(model.embedding(torch.cat([text[1:] for text in TEXTS])))
    low, high = np.percentile(block.attention.k_proj(x).numpy(), [5, 95], axis=0)
    assert_close(grid.middle.double().flatten(), torch.from_numpy(low + high) / 2, rtol=1e-5, atol=1e-5)
    assert_close(grid.width.double().flatten(), torch.from_numpy(high - low) / 2, rtol=1e-5, atol=1e-5)
    for levels in (grid.keys, grid.values):
        assert levels.encode is levels.decode  # Q-Norm is for 2 bits alone
        assert levels.encode.diff().min() > 0
        assert levels.encode.abs().max() <= 1
    norm = KVQuant(bits=2).calibrated(model, TEXTS).calibration[0].keys
    assert (norm.decode.max() - norm.decode.min()) > (
        norm.encode.max() - norm.encode.min()
    )  # Q-Norm widens what means narrowed


def test_a_whole_number_of_outliers_is_not_rounded_up():
    """Oracle: by hand: 7 % of 200 are 14, seven at either end; as floats 200 * 0.07 / 2 is a little more."""
    levels = normal_levels(4)
    layer = _Layer(KVQuant(outliers=0.07), Rotary(shape()), Levels(levels, levels), None)
    assert [layer._count(torch.zeros(n)) for n in (200, 201)] == [7, 8]


def test_calibrated_here_and_run_there(device):
    """Oracle: the same on the CPU, where the calibration was made."""
    if device.type == "cpu":
        pytest.skip("needs another device: --device cuda")
    model, sizes = decoder(head_dim=8), [30] + [1] * 10
    method = KVQuant(outliers=0.1).calibrated(model, TEXTS)
    expected = run(model, TOKENS, method.cache(model.config), sizes)
    assert_close(run(model.to(device), TOKENS.to(device), method.cache(model.config), sizes).cpu(), expected)


def test_levels_are_means_by_sensitivity():
    """Oracle: where k-means ends: each level is the mean of the numbers nearest to it, weighted with their own squared gradients, keys in
    their channels' ranges, values in those of each token, by NumPy's percentiles. Negative control: with equal weights it is not.
    """
    model = decoder(head_dim=8)
    for layer, grid in zip(
        sensitivities(model, TEXTS, skip=1), KVQuant(outliers=0.1).calibrated(model, TEXTS).calibration, strict=True
    ):
        for x, weights, levels, axis in (
            (layer.keys, layer.key_weights, grid.keys, 0),
            (layer.values, layer.value_weights, grid.values, 1),
        ):
            low, high = np.percentile(x.double().numpy(), [5, 95], axis=axis, keepdims=True)
            shares = (2 * x.double().numpy() - low - high) / (high - low)
            inside = np.abs(shares) <= 1 + 1e-6
            nearest_level = np.abs(shares[inside][:, None] - levels.encode.double().numpy()).argmin(axis=1)
            for used, close in ((weights.double().numpy()[inside], True), (np.ones(inside.sum()), False)):
                means = np.bincount(nearest_level, used * shares[inside]) / np.bincount(nearest_level, used)
                assert (np.abs(means - levels.encode.double().numpy()).max() < 1e-4) == close


def test_a_channel_that_never_moved(generator):
    """Oracle: by hand: it comes back as it was; a number far from it is an outlier."""
    config = shape(rope=Rope(theta=1e30), n_kv_heads=1, n_heads=1)  # but for the first pair nothing turns
    k = torch.randn(1, 1, 30, 32, generator=generator)
    k[..., [5, 9]] = torch.tensor([0.0, 2.5])
    k[:, :, 20, 9] = 50.0
    cache = KVQuant(warmup=10).cache(config)
    *_, (found, _, _) = feed(cache, config, k, k, [10] + [1] * 20)
    assert_close(found[0, 0, :29, [5, 9]], k[0, 0, :29, [5, 9]], rtol=1e-3, atol=1e-6)


def test_bytes_by_formula():
    """Oracle: arithmetic, from Llama's sizes down: 3 bits, of 256 keys and values 2 outliers at either end of 16 + 8 bits, 32 bits a value's range."""
    config = shape(n_heads=4, n_kv_heads=4, head_dim=64)
    k, v = draw(torch.Generator().manual_seed(0), config, 1001, dtype=torch.bfloat16)
    cache = KVQuant(bits=3).cache(config)
    cache.update(0, k, v, k, torch.arange(1001)[None])
    held = 1000 * (2 * 256 * 3 / 8 + 2 * 4 * 3 + 4) + 2 * 256 * 2
    assert cache.nbytes == held + 2 * 256 * 4 + 8 * 4 + 32 * 4  # channels' ranges, levels, frequencies


def test_each_row_measures_its_own_channels(generator):
    """Oracle: each row alone; padding is large, or no number at all."""
    config, x = shape(), torch.randn(2, 2, 101, 32, generator=generator) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    x[1, :, :17] = float("nan")
    cache, alone = (KVQuant(warmup=20).cache(config) for _ in range(2))
    for part in (slice(0, 100), slice(100, 101)):
        at = torch.arange(101)[None, part] - torch.tensor([[0], [17]])
        k, _, _ = cache.update(0, x[:, :, part], x[:, :, part], x[:, :, part], at)
        own = x[1:, :, 17:100] if part.start == 0 else x[1:, :, part]
        expected, _, _ = alone.update(
            0, own, own, own, torch.arange(own.shape[2])[None] + (0 if part.start == 0 else 83)
        )
    assert torch.equal(k[1:, :, 17:], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 must be 2 to 8"),
        ({"outliers": 0.5}, "outliers=0.5 must be a share"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"warmup": 1}, "warmup=1 must be at least 2"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        KVQuant(**change)


def test_what_can_not_be_quantized_is_refused():
    with pytest.raises(ValueError, match="rope type='dynamic'"):
        KVQuant().cache(shape(rope=Rope(type="dynamic", factor=2.0)))
    model = decoder(head_dim=8)
    method = KVQuant().calibrated(model, TEXTS)
    with pytest.raises(ValueError, match="calibration of 2 layers with 16 channels of keys is not this model's"):
        method.cache(shape(head_dim=16))
    x = torch.randn(1, 2, 80, 32)
    x[0, 0, 70, 5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        KVQuant().cache(shape()).update(0, x, x, x, torch.arange(80)[None])


def test_calibration_leaves_the_method_and_the_model():
    """Oracle: both before."""
    model = decoder(head_dim=8)
    before, method = copy.deepcopy(model.state_dict()), KVQuant()
    found = method.calibrated(model, TEXTS)
    assert method.calibration is None
    assert found == method  # what is measured is no setting
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# Claims


@pytest.fixture(scope="module")
def fitted():
    """The testbed's model, 3 bits fitted to 8 windows of training text, and held-out windows."""
    model = testbed.load()[0].requires_grad_(False)
    texts = testbed.corpus.tokens("train", 8 * 256).view(8, 256)
    return (
        model,
        KVQuant(bits=3).calibrated(model, list(texts)),
        testbed.corpus.tokens("held-out", 8 * 256).view(8, 256),
    )


def error_per_channel(x):
    """Of NormalFloat levels over each channel's whole range, 3 bits."""
    width, middle = span(x, 0.0, dim=2)
    levels = normal_levels(3)
    return float((levels[nearest((x - middle) / width, levels).long()] * width + middle - x).norm())


def test_claim_keys_before_rotation(claim, fitted):
    """Keys of all layers on one held-out text, before their rotation and as the decoder hands them over."""
    model, text, errors = fitted[0], testbed.corpus.tokens("held-out", 1024)[None], [0.0, 0.0]
    cos, sin = Rotary(model.config)(torch.arange(1024)[None], torch.float32)
    for layer in sensitivities(model, list(text)):
        k = layer.keys.unflatten(1, (model.config.n_kv_heads, -1)).transpose(0, 1)[None].contiguous()
        errors = [x + error_per_channel(y) for x, y in zip(errors, (k, rotate(k, cos, sin)), strict=True)]
    claim("kvquant", "keys-before-rotation", errors[0] / errors[1])


def test_claim_planted_keys_before_rotation(claim, generator):
    """Keys with 3 of 32 channels 8 times as large in every token."""
    config = shape()
    k = torch.randn(1, 1, 512, 32, generator=generator)
    k[..., [3, 11, 26]] += 8 * k[..., [3, 11, 26]].sign().mode(dim=2, keepdim=True).values
    turned = rotate(k, *Rotary(config)(torch.arange(512)[None], k.dtype))
    claim("kvquant", "planted-keys-before-rotation", error_per_channel(k) / error_per_channel(turned))


def test_claim_fitted_levels(claim, fitted):
    """Keys of all layers on two held-out windows, in the channels' calibrated ranges."""
    model, method, held_out = fitted
    errors, even = [0.0, 0.0], torch.linspace(-1, 1, 8)
    for layer, grid in zip(sensitivities(model, list(held_out[:2]), skip=1), method.calibration, strict=True):
        x = (layer.keys - grid.middle[0, 0]) / grid.width[0, 0]
        weights = layer.key_weights * (x.abs() <= 1) / layer.key_weights.mean()
        for i, levels in enumerate((grid.keys.encode, even)):
            errors[i] += float((weights * (levels[nearest(x, levels).long()] - x).square()).sum())
    claim("kvquant", "fitted-levels", errors[0] / errors[1])


def test_claim_one_percent_apart(claim, fitted):
    """Values of all layers of one held-out window."""
    model, _, held_out = fitted
    full, errors = FullCache(), []
    model(held_out[:1], full)
    for share in (0.01, 0.0):
        cache, total = KVQuant(bits=3, outliers=share).cache(model.config), 0.0
        for i, layer in full._layers.items():
            last = layer.v[:, :, :1]
            cache.update(i, layer.k, layer.v, layer.k, torch.arange(256)[None])
            found = cache.update(i, last, last, last, torch.tensor([[256]]))[1][:, :, :256]
            total += float((found - layer.v).norm() / layer.v.norm())
        errors.append(total)
    claim("kvquant", "one-percent-apart", errors[0] / errors[1])


def test_claim_three_bits(claim, fitted):
    """Held-out text in windows of 256, read in chunks of 32, so that most of what attention sees is quantized."""
    model, method, held_out = fitted
    losses = [
        F.cross_entropy(run(model, held_out, cache, 32)[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        for cache in (method.cache(model.config), FullCache())
    ]
    claim("kvquant", "three-bits", float((losses[0] - losses[1]).exp()))
