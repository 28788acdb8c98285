"""GEAR: blocks rebuilt by loops in NumPy, factors against the singular values, bytes by formula, claims."""

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.quantized.gear import GEAR, low_rank, outlier_places
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.model.cache import FullCache
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.quantized.rebuilt import Rebuilt, half, plain

TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))


def without_factors(vector, method):
    """One vector: outliers taken out, their places filled with the mean, groups quantized, outliers put back in half precision; and its error."""
    return _rounded(vector.tobytes(), method)


@functools.cache  # what is rebuilt at every call is the same past
def _rounded(numbers, method):
    vector = np.frombuffer(numbers)
    found, order = vector.copy(), np.argsort(vector, kind="stable")
    count = (
        min(max(1, int(len(vector) * Fraction(str(method.outliers)) / 2)), len(vector) // 2) if method.outliers else 0
    )
    out = [*order[:count], *order[len(vector) - count :]]
    found[out] = vector.mean()
    size = method.group_size or len(vector)
    for first in range(0, len(vector), size):
        found[first : first + size] = plain(found[None, first : first + size], method.bits)[0]
    error = vector - found
    found[out], error[out] = half(vector[out]), 0
    return np.stack([found, error])


def repaired(rounded, error, rank):
    """A head's tokens with the error's projection: onto the span of E (E'E)^2 P, where three rounds from P arrive."""
    start = torch.rand(error.shape[1], 4, generator=torch.Generator().manual_seed(0)).double().numpy()[:, :rank]
    basis = np.linalg.qr(error @ np.linalg.matrix_power(error.T @ error, 2) @ start)[0]
    return torch.from_numpy(rounded + basis @ (basis.T @ error))


def blocks(method):
    """The past by the paper's rules: the prompt's whole buffers are one block, and each buffer after it."""

    def rebuild(k, v, calls):
        held = 0
        for end in np.cumsum(calls):
            while end - held >= method.residual_length:
                whole = end - held - (end - held) % method.residual_length
                size, rank = (method.residual_length, method.rank) if held else (whole, method.prefill_rank)
                part, heads = slice(held, held + size), range(k.shape[1])
                for row in range(len(k)):
                    tokens = v[row, :, part].transpose(0, 1).flatten(1).numpy()
                    values = np.stack([without_factors(x, method) for x in tokens], axis=1).reshape(
                        2, size, len(heads), -1
                    )
                    for h in heads:
                        keys = np.stack([without_factors(x, method) for x in k[row, h, part].T.numpy()], axis=2)
                        k[row, h, part], v[row, h, part] = (repaired(*x, rank) for x in (keys, values[:, :, h]))
                held += size
        return k, v

    return Rebuilt(rebuild)


@pytest.mark.parametrize(
    ("settings", "kv_heads", "sizes"),
    [
        ({"bits": 2, "group_size": 4, "residual_length": 8, "outliers": 0.3}, 2, [20] + [1] * 20),
        ({"bits": 3, "group_size": None, "residual_length": 8}, 1, [1] * 40),
        ({"bits": 2, "group_size": 5, "residual_length": 7, "outliers": 0.0}, 4, [17, 3, 14, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_logits_by_the_papers_rules(settings, kv_heads, sizes):
    """Oracle: outliers and groups of every block as loops in NumPy, without factors; both backbones, and GEAR-L's without them."""
    method = GEAR(prefill_rank=0, rank=0, **settings)
    model = decoder(head_dim=8, n_kv_heads=kv_heads)
    expected = run(model, TOKENS, blocks(method), sizes)
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("outliers", [0.0, 0.3])
def test_factors_of_each_head_and_block(outliers, generator):
    """Oracle: as above, with each head's projection by a closed form, to the 16 bits in which factors are held."""
    config = shape(head_dim=8)
    k, v = draw(generator, config, 31, rows=2, dtype=torch.float64)
    method = GEAR(group_size=4, residual_length=8, outliers=outliers)
    for sizes in ([21, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [9, 15, 6, 1]):
        *_, found = feed(method.cache(config), config, k, v, sizes)
        *_, expected = feed(blocks(method), config, k, v, sizes)
        *_, unrepaired = feed(
            blocks(GEAR(group_size=4, residual_length=8, outliers=outliers, prefill_rank=0, rank=0)),
            config,
            k,
            v,
            sizes,
        )
        for x, y, z in zip(found[:2], expected[:2], unrepaired[:2], strict=True):
            size = (y - z).norm(dim=2).max()
            assert (x - y).abs().max() < 2**-10 * size  # both factors are rounded by 2^-11; Cauchy and Schwarz
            assert size > 0.1


def test_factors_lie_where_the_error_does():
    """Oracle: what torch says of devices, by tensors without numbers; the iteration's start lies on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        factors = low_rank(torch.empty(1, 1, 8, 4, device="cuda"), torch.rand(4, 2))
    assert {factor.device.type for factor in factors} == {"cuda"}


@pytest.mark.parametrize(("rank", "rows"), [(1, 40), (4, 40), (4, 3), (4, 1)])
def test_factors_come_near_the_best(rank, rows, generator):
    """Oracle: Eckart and Young: no product of this rank errs less than the singular values beyond it, and three rounds come near."""
    spectrum = torch.diag(0.6 ** torch.arange(8.0, dtype=torch.float64))
    left, right = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64)).Q for n in (40, 8))
    error = (left @ spectrum @ right.T)[:rows]
    a, b = low_rank(error, torch.rand(8, rank, generator=generator))
    best = float(torch.linalg.svdvals(error)[rank:].norm())
    assert best - 1e-9 <= float((error - a @ b.T).norm()) <= 1.1 * best + 1e-9
    assert_close(a.T @ a, torch.eye(min(rank, rows), dtype=torch.float64))
    assert not low_rank(torch.zeros(5, 8), torch.rand(8, 2))[1].any()


def test_outliers_by_hand():
    """Oracle: by hand: of 5 numbers 2 at either end at a share of 0.8, one at 0.02, none at 0; a single number has none."""
    x = torch.tensor([5.0, -7, 0, 3, 1])
    assert outlier_places(x, 0.8).tolist() == [0, 3, 1, 2]
    assert outlier_places(x, 0.02).tolist() == [0, 1]
    assert outlier_places(torch.arange(200.0), 0.29).shape == (2 * 29,)  # 200 * 0.29 / 2 is a little less than 29
    assert outlier_places(x, 0.0).tolist() == outlier_places(x[:1], 0.4).tolist() == []


def test_outliers_are_exact_and_stretch_no_range(generator):
    """Oracle: numbers a thousand times as large come back; without the filter the rest of their vectors is lost."""
    config = shape(head_dim=64, n_kv_heads=1)
    k, v = draw(generator, config, 129)
    for x in (k, v):
        x[0, 0, 5, 3], x[0, 0, 5, 41] = 4096.0, -4096.0
    exact = next(feed(FullCache(), config, k, v, [129]))
    for share, large in ((0.02, False), (0.0, True)):
        *_, found = feed(GEAR(outliers=share, prefill_rank=0).cache(config), config, k, v, [128, 1])
        error = (found[1] - exact[1]).abs()
        assert (float(error[0, 0, 5, [3, 41]].max()) > 1) == large
        assert (float(error[0, 0, 5].mean()) > 2) == large


@pytest.mark.parametrize(("group", "tokens"), [(64, 1000), (None, 300), (64, 63)])
def test_bytes_by_formula(group, tokens):
    """Oracle: arithmetic: codes, 4 bytes a group, factors and outliers in 16 bits, places in 8 or 16; what does not fill a buffer is whole."""
    config = shape(n_heads=2, n_kv_heads=2, head_dim=64)
    k, v = draw(torch.Generator().manual_seed(0), config, tokens, dtype=torch.bfloat16)
    cache = GEAR(group_size=group).cache(config)
    cache.update(0, k, v, k, torch.arange(tokens)[None])
    n = tokens // 64 * 64
    at_end = max(1, int(n * 0.01))
    codes = 2 * n * 128 * 2 / 8
    groups = 4 * (128 * n / 64 + 2 * n if group else 128 + n) if n else 0
    factors = 2 * 2 * (n + 64) * 4 * 2 if n else 0
    outliers = 128 * 2 * at_end * (3 if n <= 256 else 4) + n * 2 * (2 + 1) if n else 0
    start, buffer = 64 * 4 * 4, 2 * (tokens - n) * 128 * 2
    assert cache.nbytes == codes + groups + factors + outliers + start + buffer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1, or None"),
        ({"residual_length": 0}, "residual_length=0 must be at least 1"),
        ({"outliers": 0.5}, "outliers=0.5 must be a share"),
        ({"outliers": float("nan")}, "outliers=nan"),
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"prefill_rank": -1}, "prefill_rank=-1 must be at least 0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        GEAR(**change)


def test_an_outlier_beyond_16_bits_is_refused():
    x = torch.randn(1, 2, 64, 32)
    x[0, 0, 3, 5] = 1e6
    with pytest.raises(
        ValueError, match=r"values up to 1e\+06 do not fit torch\.float16, finite; move the model to bfloat16"
    ):
        GEAR().cache(shape()).update(0, x, x, x, torch.arange(64)[None])


# Claims


@pytest.fixture(scope="module")
def text():
    """The testbed's model and held-out text in windows of 256."""
    return testbed.load()[0].requires_grad_(False), testbed.corpus.tokens("held-out", 8 * 256).view(8, 256)


def logits(text, cache):
    """Read in chunks of 64, so that most of what attention sees is compressed."""
    return run(*text, cache, 64)[:, :-1]


def test_claim_terms_complement(claim, text):
    """Relative error of keys and values of one window, in a prompt of 256 tokens."""
    model, tokens = text
    full = FullCache()
    model(tokens[:1], full)
    errors = []
    for settings in ({}, {"outliers": 0.0}, {"prefill_rank": 0}):
        total = 0.0
        for layer in full._layers.values():
            cache, last = GEAR(**settings).cache(model.config), layer.k[:, :, :1]
            cache.update(0, layer.k, layer.v, layer.k, torch.arange(256)[None])
            found = cache.update(0, last, last, last, torch.tensor([[256]]))
            total += sum(
                float((x[:, :, :256] - y).norm() / y.norm()) for x, y in zip(found, (layer.k, layer.v), strict=False)
            )
        errors.append(total)
    claim("gear", "terms-complement", errors[0] / min(errors[1:]))


def test_claim_better_than_quantizing_alone(claim, text):
    model, tokens = text
    caches = GEAR().cache(model.config), KIVI(group_size=64, residual_length=64).cache(model.config)
    losses = [F.cross_entropy(logits(text, cache).flatten(0, 1), tokens[:, 1:].flatten()) for cache in caches]
    claim("gear", "better-than-quantizing-alone", float((losses[0] - losses[1]).exp()))


def test_claim_near_lossless(claim, text):
    model, tokens = text
    right = [
        (logits(text, cache).argmax(dim=-1) == tokens[:, 1:]).double().mean()
        for cache in (FullCache(), GEAR(bits=4).cache(model.config))
    ]
    claim("gear", "near-lossless", float(right[0] - right[1]))
