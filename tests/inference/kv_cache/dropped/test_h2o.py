"""H2O: the policy with masks written out, the split, sums that follow their tokens, memory, claims."""

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.dropped.h2o import H2O
from refimpl.model.cache import FullCache
from tests.inference.kv_cache.answers import right
from tests.inference.kv_cache.decoders import decoder, run, shape
from tests.inference.kv_cache.dropped.attention_maps import attention_of
from tests.inference.kv_cache.dropped.lookup import lookup_decoder, question, share_right, text
from tests.inference.kv_cache.dropped.masked import by_key_head, keep_only, masked, widened

TOKENS = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(1))


def policy(budget, recent):
    """After each call: the last `recent` tokens, and of those before the ones with the largest sums of attention."""

    def rule(state, weights, _):
        received = by_key_head(weights, state.alive.shape[1]).sum(dim=(2, 3))
        state.sums = received + (widened(state.sums, received.shape[2]) if hasattr(state, "sums") else 0)

        def choose(row, head, alive):
            if len(alive) <= budget:
                return alive
            old, new = alive[: len(alive) - recent], alive[len(alive) - recent :]
            return sorted(old, key=lambda j: -state.sums[row, head, j])[: budget - recent] + new

        keep_only(state, choose)

    return rule


@pytest.mark.parametrize(
    ("budget", "share", "recent", "sizes"),
    [
        (12, 0.5, 6, [1] * 60),
        (7, 0.5, 4, [30] + [1] * 30),
        (12, 0.5, 6, [25, 13, 1, 1, 5, 10, 5]),
        (10, 0.9, 9, [30] + [1] * 30),
        (9, 0, 0, [30] + [1] * 30),
        (9, 1, 9, [30] + [1] * 30),
    ],
)
def test_equals_the_policy_with_masks(budget, share, recent, sizes):
    """Oracle: everything is held, sums are kept of all tokens, and what the policy drops is masked."""
    model = decoder()
    method = H2O(budget=budget, recent_share=share)
    assert method.recent == recent
    expected = masked(model, TOKENS, sizes, policy(budget, recent))
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("changes", [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"sliding_window": (9, None)}])
def test_other_heads_and_windows(changes):
    """Oracle: as above; one key head for all, one for each, and a window that shows some of the heavy hitters."""
    model, sizes = decoder(**changes), [30] + [1] * 30
    expected = masked(model, TOKENS, sizes, policy(12, 6))
    assert_close(run(model, TOKENS, H2O(budget=12).cache(model.config), sizes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_by_hand(dtype):
    """Oracle: by hand: of even attention, token j has 1/(j+1) + ... + 1/n, in float32; 0 and 1 stay, and take their sums along."""
    config = shape(n_heads=2, n_kv_heads=1, head_dim=2)
    cache, x = H2O(budget=4).cache(config), torch.zeros(1, 1, 6, 2, dtype=dtype)
    cache.update(0, x, x, x.expand(1, 2, 6, 2), torch.arange(6)[None])
    held = cache._layers[0][0].held
    assert held.positions.tolist() == [[[0, 1, 4, 5]]]
    harmonic = [1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6, 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6, 1 / 5 + 1 / 6, 1 / 6]
    assert_close(held.notes.flatten(), 2 * torch.tensor(harmonic))  # two query heads
    cache.update(0, *[x[:, :, :1]] * 2, x[:, :, :1].expand(1, 2, 1, 2), torch.tensor([[6]]))
    assert_close(held.notes.flatten(), 2 * torch.tensor([*harmonic, 0]) + 2 / 5)  # five tokens share the query


def test_half_are_recent_and_half_are_heavy(generator):
    """Oracle: the split, counted: planted keys that every query likes stay however old they are, beside the last tokens."""
    config = shape(n_heads=1, n_kv_heads=1)
    k, v = 0.1 * torch.randn(1, 1, 200, 32, generator=generator), torch.zeros(1, 1, 200, 32)
    planted = [3, 17, 40, 41, 66]
    k[:, :, planted] += 1
    queries = torch.ones(1, 1, 200, 32)
    cache = H2O(budget=10).cache(config)
    for start, size in ((0, 80), *((start, 1) for start in range(80, 200))):
        part = slice(start, start + size)
        _, _, at = cache.update(
            0, k[:, :, part], v[:, :, part], queries[:, :, part], torch.arange(start, start + size)[None]
        )
    assert sorted(at[0, 0].tolist()) == [
        *planted,
        *range(194, 200),
    ]  # and the newest, of which one goes before the next


def test_a_prompt_read_at_once_is_seen_whole():
    """Oracle: the model without a cache; nothing is dropped before the first new token, which sees the budget."""
    model = decoder()
    found = run(model, TOKENS, H2O(budget=4).cache(model.config), [59, 1])
    assert_close(found[:, :59], model(TOKENS)[:, :59])
    assert (found - model(TOKENS))[:, 59].abs().max() > 0.1


def test_bytes_by_hand():
    """Oracle: by hand: of a long prompt budget + 1 entries: keys, values, a position and a sum of 4 bytes each, and whom to drop."""
    config = shape(n_heads=2, n_kv_heads=2)
    x = torch.zeros(1, 2, 3000, 32)
    cache = H2O(budget=16).cache(config)
    cache.update(0, x, x, x, torch.arange(3000)[None])
    assert cache.nbytes == 17 * 2 * (2 * 32 * 4 + 4 + 4)
    cache.update(0, *[x[:, :, :1]] * 3, torch.tensor([[3000]]))
    assert cache.nbytes == 17 * 2 * (2 * 32 * 4 + 4 + 4) + 2 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"recent_share": 1.5}, "recent_share=1.5 must be 0 to 1"),
        ({"recent_share": -0.1}, "recent_share=-0.1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        H2O(**change)


# Claims


def remembered(cache):
    """Share of questions answered at the end of a text: for facts that were asked for early on, and for facts that are new."""
    model, early, late = lookup_decoder(), [3, 8, 11, 17, 20, 22], [1, 5, 9, 13]
    prompt = text(20, [token for fact in early for token in (fact, question(fact))], 200, late)
    return share_right(model, cache(model.config), prompt, early + late, chunk=8)


def test_the_planted_decoder_answers():
    """Oracle: by construction: all with the full cache, and none that was not in the text."""
    assert remembered(lambda config: FullCache()) == 1
    assert share_right(lookup_decoder(), FullCache(), text(20, [3], 20), [4, 5]) == 0


def test_claim_heavy_hitters_restore(claim):
    """A budget of 60 for 317 tokens."""
    claim("h2o", "heavy-hitters-restore", remembered(H2O(budget=60).cache))


def test_claim_both_needed(claim):
    alone = [remembered(H2O(budget=60, recent_share=share).cache) for share in (0.0, 1.0)]
    claim("h2o", "both-needed", max(alone))


def test_claim_five_times_less_memory(claim):
    config = shape(n_heads=1, n_kv_heads=1, head_dim=128)
    x = torch.zeros(1, 1, 1000, 128, dtype=torch.bfloat16)
    cache = H2O(budget=200).cache(config)
    cache.update(0, x, x, x, torch.arange(1000)[None])
    claim("h2o", "five-times-less-memory", 2 * x.nbytes / cache.nbytes)


def test_claim_prefill_left_whole(claim):
    """Answers of the testbed's model: the prompt read at once, and in chunks, after each of which tokens go."""
    whole, chunks = (right(lambda config, n: H2O(budget=n // 4).cache(config), chunk) for chunk in (None, 64))
    claim("h2o", "prefill-left-whole", whole - chunks)


def test_claim_attention_is_sparse(claim):
    """Text of the testbed that it was not trained on."""
    tokens = torch.as_tensor(testbed.corpus.tokens("held-out")[:512]).long().unsqueeze(0)
    seen = torch.ones(512, 512, dtype=torch.bool).tril()
    sparse = [
        ((weights < 0.01 * weights.amax(dim=-1, keepdim=True)) & seen).sum() / (seen.sum() * weights.shape[0])
        for weights in attention_of(testbed.subject().model, tokens)
    ]
    claim("h2o", "attention-is-sparse", sum(share > 0.95 for share in sparse) / len(sparse))


def test_claim_heavy_hitters_restore_when_trained(claim):
    """Answers of the testbed's model, a fifth of the prompt's tokens kept."""
    both, recent = (
        right(lambda config, n, share=share: H2O(budget=n // 5, recent_share=share).cache(config))
        for share in (0.5, 1.0)
    )
    claim("h2o", "heavy-hitters-restore-when-trained", both - recent)
