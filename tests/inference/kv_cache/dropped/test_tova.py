"""TOVA: the policy with masks written out, a step by hand, the same tokens for all heads, claims."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.dropped.tova import TOVA
from tests.inference.kv_cache.answers import right
from tests.inference.kv_cache.decoders import decoder, run, shape
from tests.inference.kv_cache.dropped.lookup import lookup_decoder, question, share_right, text
from tests.inference.kv_cache.dropped.masked import keep_only, masked

TOKENS = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(1))


def policy(budget):
    """After each call: the tokens with the largest attention of its last query, on the mean of all query heads."""

    def rule(state, weights, _):
        mean = weights[:, :, -1].mean(dim=1)  # [rows, n]
        keep_only(state, lambda row, _, alive: sorted(alive, key=lambda j: -mean[row, j])[:budget])

    return rule


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [(12, [1] * 60), (7, [30] + [1] * 30), (12, [25, 13, 1, 1, 5, 10, 5]), (1, [30] + [1] * 30)],
)
def test_equals_the_policy_with_masks(budget, sizes):
    """Oracle: everything is held, and what the last query's mean attention leaves out is masked."""
    model = decoder()
    expected = masked(model, TOKENS, sizes, policy(budget))
    assert_close(run(model, TOKENS, TOVA(budget=budget).cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("changes", [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"sliding_window": (5, None)}])
def test_other_heads_and_windows(changes):
    """Oracle: as above; one key head for all, one for each, and a window narrower than the budget."""
    model, sizes = decoder(**changes), [30] + [1] * 30
    expected = masked(model, TOKENS, sizes, policy(12))
    assert_close(run(model, TOKENS, TOVA(budget=12).cache(model.config), sizes), expected)


def logits_of(*weights):
    """Queries `[1, heads, 1, heads * n]` and keys `[1, 1, n, heads * n]` of which the attention has these weights, a head in each row."""
    weights = torch.tensor(weights)
    heads, n = weights.shape
    k = torch.eye(n).repeat(1, heads).view(1, 1, n, heads * n)
    q = torch.zeros(heads, heads, n)
    q[range(heads), range(heads)] = weights.log() * (heads * n) ** 0.5
    return q.view(1, heads, 1, heads * n), k


def test_a_step_by_hand():
    """Oracle: by hand: means .25, .26, .23, .26 of two heads: 2 goes, whom neither head likes least; no window saves anyone."""
    q, k = logits_of([0.45, 0.05, 0.23, 0.27], [0.05, 0.47, 0.23, 0.25])
    config = shape(n_heads=2, n_kv_heads=1, head_dim=8)
    cache = TOVA(budget=3).cache(config)
    queries = torch.cat([q.flip(1) * 0.3] * 3 + [q], dim=2)  # those before the last have no say
    cache.update(0, k, k, queries, torch.arange(4)[None])
    _, v, at = cache.update(0, k[:, :, :1], k[:, :, :1], q, torch.tensor([[4]]))
    assert at.tolist() == [[0, 1, 3, 4]]
    assert torch.equal(v[0, 0], k[0, 0, [0, 1, 3, 0]])


def test_even_the_newest_may_go():
    """Oracle: by hand: the newest token, which the query likes least, goes at once, as in the official code."""
    q, k = logits_of([0.4, 0.3, 0.2, 0.1])
    cache = TOVA(budget=3).cache(shape(n_heads=1, n_kv_heads=1, head_dim=4))
    cache.update(0, k, k, q.expand(1, 1, 4, 4), torch.arange(4)[None])
    *_, at = cache.update(0, k[:, :, :1], k[:, :, :1], q, torch.tensor([[4]]))
    assert sorted(at[0].tolist()) == [0, 1, 2, 4]


def test_bytes_by_hand():
    """Oracle: by hand: budget + 1 entries of keys and values in each head, a position for all heads, and whom to drop."""
    x = torch.zeros(1, 2, 3000, 32)
    cache = TOVA(budget=16).cache(shape(n_heads=2))
    cache.update(0, x, x, x, torch.arange(3000)[None])
    cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[3000]]))
    assert cache.nbytes == 17 * (2 * 2 * 32 * 4 + 4) + 8


def test_configuration_is_checked():
    with pytest.raises(ValueError, match="budget=0 must be at least 1"):
        TOVA(budget=0)


# Claims


def found_at_an_eighth(kind):
    """Share of facts, at depths from the start to the end of 420 tokens, that are said twice: for the prompt's last token, and the same again."""
    model, found = lookup_decoder(), []
    for i, fact in enumerate([2, 7, 12, 15, 19, 21]):
        prompt = text(10 + 55 * i, [fact], 400 - 55 * i, [question(fact)])
        cache = kind(budget=prompt.shape[1] // 8).cache(model.config)
        found.append(share_right(model, cache, prompt, [fact]))
    return sum(found) / len(found)


def test_claim_full_at_an_eighth(claim):
    claim("tova", "full-at-an-eighth", found_at_an_eighth(TOVA))


def test_claim_better_than_a_window(claim):
    claim("tova", "better-than-a-window", found_at_an_eighth(TOVA) - found_at_an_eighth(StreamingLLM))


def test_claim_the_first_token_stays(claim):
    """Read token by token, with two questions in between; negative control: what nobody looks for goes."""
    model, first, second = lookup_decoder(), [], []
    cache = TOVA(budget=20).cache(model.config)
    for token in text(20, [1, 5, question(1)], 60, [question(5)], 60).split(1, dim=1):
        model(token, cache)
        held = cache._layers[0][0].held.entries()[2]
        first.append(held is None or 0 in held)
        second.append(held is None or 21 + 5 in held)  # the fact 1
    claim("tova", "the-first-token-stays", sum(first) / len(first))
    assert not all(second)


def test_claim_better_than_a_window_when_trained(claim):
    """Answers of the testbed's model, a quarter of the prompt's tokens kept."""
    ours, window = (
        right(lambda config, n, kind=kind: kind(budget=n // 4).cache(config)) for kind in (TOVA, StreamingLLM)
    )
    claim("tova", "better-than-a-window-when-trained", ours - window)
