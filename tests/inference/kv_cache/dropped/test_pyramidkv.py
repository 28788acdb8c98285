"""PyramidKV: Eq. (1) and the official arithmetic, sums, SnapKV's choice in each layer, claims."""

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.dropped.pyramidkv import PyramidKV
from refimpl.inference.kv_cache.dropped.snapkv import SnapKV
from tests.inference.kv_cache.answers import right
from tests.inference.kv_cache.decoders import decoder
from tests.inference.kv_cache.dropped.attention_maps import attention_of
from tests.inference.kv_cache.dropped.masked import masked
from tests.inference.kv_cache.dropped.test_snapkv import TOKENS, decoded, listing


def shares(method, layers, length):
    return [method.chosen(layer, layers, length) for layer in range(layers)]


def official(budget, window, beta, layers, length):
    """The official code's arithmetic, the window left out; it takes whole numbers for beta."""
    mean = budget - window
    low = mean // beta
    high = mean * 2 - low
    if high >= length - window:
        high = length - window
        low = mean * 2 - high
    step = (high - low) // (layers - 1)
    return [mean if length < 2 * mean else high - layer * step for layer in range(layers)]


@pytest.mark.parametrize(
    ("budget", "window", "beta", "layers", "length"),
    [
        (2048, 32, 20, 32, 10_000),
        (128, 8, 20, 24, 500),
        (64, 8, 20, 7, 100),
        (64, 8, 14, 7, 60),
        (12, 11, 20, 2, 50),
        (70, 8, 3, 5, 900),
    ],
)
def test_shares_are_the_official_ones_but_for_rounding(budget, window, beta, layers, length):
    """Oracle: the official arithmetic, whose step is rounded down; and Eq. (1) in fractions, of which each share is within one."""
    method = PyramidKV(budget=budget, window=window, beta=beta)
    found, mean = shares(method, layers, length), budget - window
    expected = official(budget, window, beta, layers, length)
    assert sum(found) == layers * mean <= sum(expected)
    assert found == sorted(found, reverse=True)
    assert found[0] == expected[0]
    line = [found[0] + (found[-1] - found[0]) * layer / (layers - 1) for layer in range(layers)]
    assert all(abs(x - y) < 1 for x, y in zip(found, line, strict=True))
    if (expected[0] - (2 * mean - expected[0])) % (layers - 1) == 0:
        assert found == expected


def test_shares_by_hand():
    """Oracle: by hand from Eq. (1): a mean of 2,016, the top a twentieth, the bottom what is left of twice the mean."""
    found = shares(PyramidKV(), 32, 100_000)
    assert (found[0], found[-1], sum(found)) == (2 * 2016 - 100, 100, 32 * 2016)
    assert shares(PyramidKV(budget=28, window=8, beta=4), 3, 1000) == [35, 20, 5]
    assert shares(PyramidKV(budget=28, window=8, beta=4), 3, 40) == [
        32,
        20,
        8,
    ]  # the prompt has no more than 32 before the window
    assert shares(PyramidKV(budget=28, window=8, beta=4), 3, 39) == [20, 20, 20]  # and here less than twice the mean
    assert shares(PyramidKV(budget=28, window=8, beta=1), 4, 1000) == [20] * 4
    assert shares(PyramidKV(budget=28, window=8), 1, 1000) == [20]


def test_each_layer_makes_the_choice_of_snapkv():
    """Oracle: SnapKV's listing with another budget in each layer; with beta = 1 it is SnapKV."""
    model, sizes = decoder(n_layers=3), [40] + [1] * 20
    method = PyramidKV(budget=12, window=4, kernel=3, beta=4)
    expected = masked(model, TOKENS, sizes, listing(40, [18, 12, 6].__getitem__, 4, 3, "average"))
    assert_close(decoded(model, method, sizes), expected)
    even = PyramidKV(budget=12, window=4, kernel=3, beta=1)
    same = decoded(model, SnapKV(budget=12, window=4, kernel=3), sizes)
    assert torch.equal(decoded(model, even, sizes), same)
    assert (same - expected).abs().max() > 0.1  # negative control


def test_configuration_is_checked():
    with pytest.raises(ValueError, match=r"beta=0.5 must be at least 1"):
        PyramidKV(beta=0.5)
    with pytest.raises(ValueError, match="kernel=2 must be odd"):
        PyramidKV(kernel=2)


# Claims


def compressed(model, method, tokens):
    """The state of each layer after a prompt."""
    cache = method.cache(model.config)
    with torch.no_grad():
        model.hidden(tokens, cache)
    cache.compress_prefill()
    return [cache._layers[layer][0].held for layer in range(model.config.n_layers)]


def test_claim_the_same_total(claim):
    """Tokens held in seven layers, of a prompt on which the step from layer to layer is no whole number."""
    model = decoder(n_layers=7)
    sums = [
        sum(held.length for held in compressed(model, kind(budget=20, window=8, kernel=3), TOKENS))
        for kind in (PyramidKV, SnapKV)
    ]
    claim("pyramidkv", "the-same-total", sums[0] / sums[1])


def text(n):
    """Tokens of the testbed that it was not trained on."""
    return torch.as_tensor(testbed.corpus.tokens("held-out")[:n]).long().unsqueeze(0)


def test_claim_attention_narrows(claim):
    """Tokens that take 90 % of a query's attention, mean over heads and the second half of a text."""
    maps = [
        maps[:, 256:].sort(dim=-1, descending=True).values for maps in attention_of(testbed.subject().model, text(512))
    ]
    widths = [float((weights.cumsum(dim=-1) < 0.9).sum(dim=-1).add(1.0).mean()) for weights in maps]
    claim("pyramidkv", "attention-narrows", widths[0] / widths[-1])


def test_claim_unequal_shares_answer_more(claim):
    """Answers of several tokens by the testbed's model: the first one comes from the full cache, whatever is dropped after the prompt."""
    ours, equal = (
        right(
            lambda config, n, kind=kind: kind(budget=n // 4).cache(config),
            rows=32,
            tasks=("retrieval", "code_completion"),
        )
        for kind in (PyramidKV, SnapKV)
    )
    claim("pyramidkv", "unequal-shares-answer-more", ours - equal)


def test_claim_unequal_shares_lose_less(claim):
    """Attention of the 32 tokens after a prompt that goes to tokens of it that were dropped, mean over layers."""
    model, tokens = testbed.subject().model, text(544)
    maps, lost = attention_of(model, tokens), []
    group = model.config.n_heads // model.config.n_kv_heads
    for kind in (PyramidKV, SnapKV):
        method = kind(budget=64, window=8, kernel=7, pooling="maximum")
        shares = []
        for weights, held in zip(maps, compressed(model, method, tokens[:, :512]), strict=True):
            gone = torch.ones(len(weights) // group, 512).scatter(1, held.positions[0].long(), 0)
            paid = weights[:, 512:, :512]
            shares.append((paid * gone.repeat_interleave(group, dim=0).unsqueeze(1)).sum() / paid.sum())
        lost.append(sum(shares) / len(shares))
    claim("pyramidkv", "unequal-shares-lose-less", lost[0] / lost[1])
