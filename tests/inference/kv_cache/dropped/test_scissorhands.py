"""Scissorhands: the loop with masks written out, marks by hand, equal counts, claims."""

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.dropped.scissorhands import Scissorhands
from refimpl.model.cache import FullCache
from tests.inference.kv_cache.answers import right
from tests.inference.kv_cache.decoders import decoder, run, shape
from tests.inference.kv_cache.dropped.attention_maps import attention_of
from tests.inference.kv_cache.dropped.lookup import lookup_decoder, question, share_right, text
from tests.inference.kv_cache.dropped.masked import by_key_head, keep_only, masked

TOKENS = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(1))


def policy(budget, history, recent, drop):
    """After each call above the budget: count in the last `history` queries who got more than evenly, and drop the lowest counts."""

    def rule(state, weights, _):
        kv_heads, n = state.alive.shape[1:]
        first = n - weights.shape[2]
        mean = by_key_head(weights, kv_heads).mean(dim=2)  # [rows, kv_heads, time, n]
        state.pivotal = getattr(state, "pivotal", [])  # to each query: [rows, kv_heads, tokens so far]
        for i in range(weights.shape[2]):
            now = slice(0, first + i + 1)
            entries = state.seen.expand(mean.shape)[:, :, i].sum(dim=-1, keepdim=True)
            state.pivotal.append(mean[:, :, i, now] * entries > 1)

        def choose(row, head, alive):
            if len(alive) <= budget:
                return alive

            def count(j):
                if j >= n - recent:
                    return float("inf")
                return sum(int(marks[row, head, j]) for marks in state.pivotal[-history:] if j < marks.shape[-1])

            order = sorted(alive, key=lambda j: (-count(j), -j))  # of equal counts the youngest first
            return order[: min(len(alive) - drop, budget)]

        keep_only(state, choose)

    return rule


@pytest.mark.parametrize(
    ("budget", "history", "recent", "drop", "sizes"),
    [
        (12, 400, 10, 6, [1] * 60),
        (12, 9, 2, 6, [30] + [1] * 30),
        (13, 17, 3, 6, [25, 13, 1, 1, 5, 10, 5]),
        (12, 8, 3, 12, [14] + [1] * 46),
        (12, 20, 0, 1, [30] + [1] * 30),
    ],
)
def test_equals_the_loop_with_masks(budget, history, recent, drop, sizes):
    """Oracle: Algorithms 1 and 2 in plain loops over tokens, everything held and what is dropped masked."""
    model = decoder()
    method = Scissorhands(budget=budget, history=history, recent=recent, drop_share=drop / budget)
    assert method.drop == drop
    expected = masked(model, TOKENS, sizes, policy(budget, history, recent, drop))
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("changes", [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"sliding_window": (5, None)}])
def test_other_heads_and_windows(changes):
    """Oracle: as above; one key head for all, one for each, and a window, in which the even share is that of what it shows."""
    model, sizes = decoder(**changes), [30] + [1] * 30
    expected = masked(model, TOKENS, sizes, policy(12, 9, 3, 6))
    found = run(model, TOKENS, Scissorhands(budget=12, history=9, recent=3).cache(model.config), sizes)
    assert_close(found, expected)


def fed(method, likes):
    """Positions held, `[n]`, after queries that like the tokens of each row of `likes` and attend evenly to these alone."""
    n = len(likes)
    cache = method.cache(shape(n_heads=1, n_kv_heads=1, head_dim=n + n % 2))
    k = 9 * torch.eye(n, n + n % 2).view(1, 1, n, -1)
    for i, row in enumerate(likes):
        q = torch.zeros(1, 1, 1, k.shape[3])
        q[..., row] = 9.0
        cache.update(0, k[:, :, i : i + 1], k[:, :, i : i + 1], q, torch.tensor([[i]]))
        if i == n - 1:
            return cache._layers[0][0].held.positions[0, 0].tolist()
    return None


def test_a_drop_by_hand():
    """Oracle: by hand: of seven tokens three go: 1 and 2, which the last four queries leave out, and of 0, 3, 4 with three each the oldest."""
    likes = [[0], [1], [2], [0, 3], [0, 3, 4], [4], [4, 3, 0]]
    assert fed(Scissorhands(budget=6, history=4, recent=2), likes) == [3, 4, 5, 6]
    assert fed(Scissorhands(budget=6, history=4, recent=0), likes) == [0, 3, 4, 6]  # and of 5 and 6 with none the older


def test_the_history_ends():
    """Oracle: by hand: token 0 was pivotal four times and 1 twice, but of the last three queries once and twice."""
    likes = [[0], [0], [0], [0], [0], [1], [1]]
    method = {"budget": 6, "recent": 1, "drop_share": 5 / 6}
    assert fed(Scissorhands(**method, history=7), likes) == [0, 6]
    assert fed(Scissorhands(**method, history=3), likes) == [1, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_even_share_is_not_pivotal(dtype):
    """Oracle: by hand: queries of 0 attend evenly, and mark no token, not even the first, which has all of its own query."""
    cache = Scissorhands(budget=60).cache(shape(n_heads=1, n_kv_heads=1, head_dim=4))
    x = torch.zeros(1, 1, 60, 4, dtype=dtype)  # a share of 1/25 is rounded down in float32
    cache.update(0, x, x, x, torch.arange(60)[None])
    assert not cache._layers[0][0].held.notes.any()


def test_all_of_the_budget_may_go():
    """Oracle: by hand: m = B leaves one of B + 1."""
    assert fed(Scissorhands(budget=6, recent=1, drop_share=1.0), [[0]] * 7) == [6]
    assert Scissorhands(budget=100, drop_share=0.29).drop == 29  # 0.29 * 100 is a little less


def test_a_long_prompt_fills_the_budget_and_a_token_more_halves_it():
    """Oracle: Algorithm 1, counted: a prompt is cut to B; then B + 1 - m, and so on up to B and one more."""
    model = decoder()
    cache, sizes = Scissorhands(budget=12).cache(model.config), []
    held = lambda: cache._layers[0][0].held.length  # noqa: E731
    model(TOKENS[:, :40], cache)
    for token in TOKENS[:, 40:].split(1, dim=1):
        sizes.append(held())
        model(token, cache)
    assert sizes == [12, 7, 8, 9, 10, 11, 12] + [7, 8, 9, 10, 11, 12] * 2 + [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"history": 0}, "history=0 must be at least 1"),
        ({"recent": -1}, "recent=-1 must be at least 0"),
        ({"drop_share": 0.0}, "drop_share=0.0 must be above 0"),
        ({"drop_share": 1.1}, "drop_share=1.1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Scissorhands(**change)


# Claims


def test_claim_nothing_lost_at_a_fifth(claim):
    """Facts that were asked for early on, 200 tokens before the end, and again at the end; all are known to the full cache."""
    model, facts = lookup_decoder(), [3, 8, 11, 17, 20, 22]
    prompt = text(20, [token for fact in facts for token in (fact, question(fact))], 200)
    assert share_right(model, FullCache(), prompt, facts) == 1
    cache = Scissorhands(budget=prompt.shape[1] // 5).cache(model.config)
    claim("scissorhands", "nothing-lost-at-a-fifth", share_right(model, cache, prompt, facts, chunk=8))


def test_claim_five_times_less_memory(claim):
    config = shape(n_heads=1, n_kv_heads=1, head_dim=128)
    x = torch.zeros(1, 1, 1000, 128, dtype=torch.bfloat16)
    cache = Scissorhands(budget=200).cache(config)
    cache.update(0, x, x, x, torch.arange(1000)[None])
    claim("scissorhands", "five-times-less-memory", 2 * x.nbytes / cache.nbytes)


def test_claim_pivotal_tokens_are_few(claim):
    """Of the first half of a text, the tokens to which some query of that half pays more than 1/t, mean over heads and layers."""
    tokens = torch.as_tensor(testbed.corpus.tokens("held-out")[:512]).long().unsqueeze(0)
    maps = torch.stack(attention_of(testbed.subject().model, tokens))[..., :256, :256]
    pivotal = (maps > 1 / torch.arange(1, 257)[:, None]).any(dim=2)
    claim("scissorhands", "pivotal-tokens-are-few", pivotal.float().mean())


def test_claim_nothing_lost_when_trained(claim):
    """Answers of the testbed's model, a fifth of the prompt's tokens kept."""
    ours, full = (
        right(lambda config, n: Scissorhands(budget=n // 5).cache(config)),
        right(lambda config, n: FullCache()),
    )
    claim("scissorhands", "nothing-lost-when-trained", ours / full)
