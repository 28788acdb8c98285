"""SnapKV: the official listing with masks, pooling at the ends, chunks, what comes after the prompt, claims."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.inference.kv_cache.dropped.snapkv import SnapKV, votes
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.dropped.lookup import FILLER, lookup_decoder, question, share_right, text
from tests.inference.kv_cache.dropped.masked import by_key_head, keep_only, masked

TOKENS = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(1))
POOLS = {"average": F.avg_pool1d, "maximum": F.max_pool1d}


def listing(prompt, budget, window, kernel, pooling):
    """The paper's Listing 1 after the call that ends the prompt; nothing after any other. `budget(layer)` counts the window.

    Maxima are the same for neighbours, and the listing leaves open which of them stay: here the first.
    """

    def rule(state, weights, layer):
        n = state.alive.shape[2]
        if n != prompt or n <= budget(layer):
            return
        vote = weights[:, :, -window:, :-window].sum(dim=2)
        vote = by_key_head(vote, state.alive.shape[1]).mean(dim=2)
        pooled = POOLS[pooling](vote, kernel, stride=1, padding=kernel // 2)

        def choose(row, head, alive):
            order = sorted(alive[:-window], key=lambda j: -pooled[row, head, j])
            return order[: budget(layer) - window] + alive[-window:]

        keep_only(state, choose)

    return rule


def decoded(model, method, sizes):
    """Logits of a prompt, sizes[0], and what follows."""
    cache = method.cache(model.config)
    prompt = model(TOKENS[:, : sizes[0]], cache)
    cache.compress_prefill()
    return torch.cat([prompt, run(model, TOKENS[:, sizes[0] :], cache, sizes[1:])], dim=1)


@pytest.mark.parametrize(
    ("budget", "window", "kernel", "pooling"),
    [
        (12, 5, 3, "average"),
        (12, 5, 5, "maximum"),
        (12, 1, 1, "average"),
        (12, 11, 7, "average"),
        (39, 8, 5, "maximum"),
    ],
)
def test_equals_the_listing_with_masks(budget, window, kernel, pooling):
    """Oracle: Listing 1 on the weights of the whole prompt, everything held and what is not chosen masked."""
    model, sizes = decoder(), [40] + [1] * 12 + [3, 5]
    method = SnapKV(budget=budget, window=window, kernel=kernel, pooling=pooling)
    expected = masked(model, TOKENS, sizes, listing(40, lambda _: budget, window, kernel, pooling))
    assert_close(decoded(model, method, sizes), expected)
    assert_close(expected[:, :40], model(TOKENS)[:, :40])
    assert (expected - model(TOKENS)).abs().max() > (0.1 if budget == 12 else 0.001)  # negative control


@pytest.mark.parametrize("changes", [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"sliding_window": (9, None)}])
def test_other_heads_and_windows(changes):
    """Oracle: as above; with a key head for each query head this is the official code itself."""
    model, sizes = decoder(**changes), [40] + [1] * 20
    expected = masked(model, TOKENS, sizes, listing(40, lambda _: 12, 5, 3, "average"))
    assert_close(decoded(model, SnapKV(budget=12, window=5, kernel=3), sizes), expected)


def test_defaults_are_the_official_ones():
    """Oracle: `init_snapkv`."""
    assert SnapKV() == SnapKV(budget=2048, window=32, kernel=5, pooling="average")


def test_pooling_by_hand():
    """Oracle: by hand: two queries give token 2 all they have; averages count three tokens, those beyond the ends as 0."""
    k = torch.zeros(1, 1, 6, 4)
    k[0, 0, 2, 0] = 100.0
    queries = torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 2, 4)
    assert_close(votes(queries, k, 1), torch.tensor([[[0.0, 0, 2, 0]]]))
    assert_close(votes(queries, k, 3), torch.tensor([[[0.0, 2 / 3, 2 / 3, 2 / 3]]]))
    assert_close(votes(queries, k.roll(-2, 2), 3), torch.tensor([[[2 / 3, 2 / 3, 0, 0]]]))
    assert_close(votes(queries, k, 3, "maximum"), torch.tensor([[[0.0, 2, 2, 2]]]))


@pytest.mark.parametrize("sizes", [[1] * 50, [7] * 7 + [1], [47, 3], [3, 47]])
def test_a_prompt_in_chunks_leaves_what_the_whole_leaves(sizes, generator):
    """Oracle: the same keys handed over at once; chunks shorter than the window, too."""
    config = shape()
    k, v = draw(generator, config, 50, rows=2)
    found = []
    for cut in (sizes, [50]):
        cache = SnapKV(budget=16, window=6).cache(config)
        for _ in feed(cache, config, k, v, cut):
            pass
        cache.compress_prefill()
        found.append(cache._layers[0][0].held.entries())
    assert torch.equal(found[0][2], found[1][2])
    assert found[0][2].shape == (2, 2, 16)
    assert_close(found[0][0], found[1][0])


def test_afterwards_nothing_goes():
    """Oracle: counting; a second call finds no prompt, and what is read after the first stays."""
    model = decoder()
    cache = SnapKV(budget=12, window=4).cache(model.config)
    model(TOKENS[:, :40], cache)
    held = lambda: cache._layers[1][0].held  # noqa: E731
    before = cache.nbytes
    assert before == 2 * 2 * (2 * 40 * (2 * 32 * 8 + 4) + 4 * 4 * 32 * 8)  # of the queries the window's alone
    cache.compress_prefill()
    assert cache.nbytes < before / 3
    assert cache.nbytes == 2 * 2 * 2 * 12 * (2 * 32 * 8 + 4)
    run(model, TOKENS[:, 40:55], cache, [5] + [1] * 10)
    cache.compress_prefill()
    assert held().positions.shape[2] == 27
    assert held().positions[..., -19:].tolist() == [[list(range(36, 55))] * 2] * 2


def test_a_budget_within_the_window_leaves_one_choice():
    """Oracle: the listing with the window that is left."""
    model, sizes = decoder(), [40] + [1] * 20
    expected = masked(model, TOKENS, sizes, listing(40, lambda _: 9, 8, 5, "average"))
    assert_close(decoded(model, SnapKV(budget=9), sizes), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1}, "budget=1 must be at least 2"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"kernel": -1}, "kernel=-1"),
        ({"pooling": "max"}, "pooling='max' must be one of average, maximum"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SnapKV(**change)


# Claims


def test_claim_needle_at_380_times(claim):
    """The prompt ends with the question; then it is asked again. Window and pooling are those of the paper's test."""
    model, found = lookup_decoder(), []
    for depth in (0.1, 0.5, 0.9):
        prompt = text(int(9100 * depth), [4], int(9100 * (1 - depth)), [question(4)], 8)
        cache = SnapKV(budget=prompt.shape[1] // 380, window=16, pooling="maximum").cache(model.config)
        found.append(share_right(model, cache, prompt, [4]))
    claim("snapkv", "needle-at-380-times", sum(found) / len(found))


def test_claim_pooling_keeps_details_together(claim):
    """Five facts in a row, of which the end of the prompt asks for the middle one."""
    model, needle = lookup_decoder(), list(range(201, 206))
    row, end = torch.tensor([[2, 6, 9, 13, 20]]), torch.tensor([[question(9)] + [FILLER] * 8])
    prompt, kept = torch.cat([text(200), row, text(200)[:, 1:], end], dim=1), []
    for kernel in (5, 1):
        cache = SnapKV(budget=28, window=16, kernel=kernel).cache(model.config)
        model(prompt, cache)
        cache.compress_prefill()
        at = cache._layers[0][0].held.positions[0, 0].tolist()
        kept.append(sum(j in at for j in needle) / 5)
    claim("snapkv", "pooling-keeps-details-together", kept[0] - kept[1])
    assert kept == [1, 0.2]


def test_claim_memory_at_16k(claim):
    config = shape(n_heads=1, n_kv_heads=1, head_dim=128)
    cache, x = SnapKV().cache(config), torch.zeros(1, 1, 16_384, 128, dtype=torch.bfloat16)
    cache.update(0, x, x, x, torch.arange(16_384)[None])
    cache.compress_prefill()
    claim("snapkv", "memory-at-16k", 2 * x.nbytes / cache.nbytes)
