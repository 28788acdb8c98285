"""Quest: the choice by loops, each query head's own, what is read and what is held, claims."""

import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.dropped.h2o import H2O
from refimpl.inference.kv_cache.retrieved.quest import Quest
from refimpl.model.cache import FullCache
from refimpl.model.generate import generate
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.dropped.lookup import lookup_decoder, share_right, text
from tests.inference.kv_cache.retrieved.written_out import stepped, turned

TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def by_loops(model, method):
    """What each query head finds in its own pages: bounds summed channel by channel, pages ranked in Python."""

    def find(layer, q, k, v, start):
        n, size, window = k.shape[2], method.page_size, model.config.sliding_window[layer] or math.inf
        q, k = turned(model, q, range(start, n)), turned(model, k, range(n))
        seen = torch.ones(*q.shape[:3], n, dtype=torch.bool).tril(start)
        seen &= torch.arange(start, n)[:, None] - torch.arange(n) < window
        if q.shape[2] == 1 and layer >= method.dense_layers:
            for row, head in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
                query, bound = q[row, head, 0].tolist(), {}
                for page in range((n - 1) // size):
                    least, greatest = k[row, head, page * size : (page + 1) * size].aminmax(dim=0)
                    channels = zip(query, least.tolist(), greatest.tolist(), strict=True)
                    in_window = (page + 1) * size > n - window
                    bound[page] = sum(max(x * m, x * M) for x, m, M in channels) if in_window else -math.inf
                best = sorted(bound, key=bound.get, reverse=True)[: method.pages - 1]
                read = {*best, (n - 1) // size}
                seen[row, head] &= torch.tensor([token // size in read for token in range(n)])
        scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~seen, float("-inf"))
        return scores.softmax(dim=-1) @ v

    return find


@pytest.mark.parametrize(
    ("changes", "method", "sizes"),
    [
        ({}, Quest(budget=16, page_size=4, dense_layers=0), [30] + [1] * 10),
        ({"n_kv_heads": 1}, Quest(budget=21, page_size=7, dense_layers=1), [24, 1, 1, 7, 1] + [1] * 6),
        ({"n_kv_heads": 4, "sliding_window": (19, None)}, Quest(budget=9, page_size=3, dense_layers=0), [34] + [1] * 6),
    ],
    ids=["grouped heads", "one dense layer", "a window"],
)  # fmt: skip
def test_equals_the_choice_by_loops(changes, method, sizes):
    """Oracle: all keys held, every page's bound summed in Python, everything outside a head's pages masked."""
    model = decoder(**changes)
    expected = stepped(model, TOKENS, sizes, by_loops(model, method))
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


def test_query_heads_of_one_key_head_read_their_own_pages():
    """Oracle: by hand: two queries that point opposite ways, keys of which pages 1 and 2 lie along one and the other."""
    config = shape(n_heads=2, n_kv_heads=1, head_dim=2)
    cache, k = Quest(budget=6, page_size=2, dense_layers=0).cache(config), torch.zeros(1, 1, 13, 2)
    k[:, :, 2:4, 0], k[:, :, 4:6, 0], k[:, :, 9, 1] = 3.0, -3.0, 5.0
    queries = torch.tensor([[[[1.0, 0.1]], [[-1.0, 0.1]]]])
    cache.update(0, k[:, :, :12], k[:, :, :12], k[:, :, :12].expand(1, 2, 12, 2), torch.arange(12)[None])
    found, _, at = cache.update(0, k[:, :, 12:], k[:, :, 12:], queries, torch.tensor([[12]]))
    assert at.tolist() == [[[2, 3, 8, 9, 12], [4, 5, 8, 9, 12]]]
    assert found[0, :, :2, 0].tolist() == [[3.0, 3.0], [-3.0, -3.0]]


@pytest.mark.parametrize(("budget", "pages"), [(1, 3), (48, 3), (64, 4), (79, 4), (512, 32)])
def test_pages_by_hand(budget, pages):
    """Oracle: by hand: whole pages of 16, and the official evaluation's floor of three."""
    assert Quest(budget=budget).pages == pages


def test_what_is_read_and_what_is_held():
    """Oracle: by hand, in tokens of 64 numbers: 100 tokens are held with bounds of 13 pages; the last reads all of a dense layer, and 12 bounds and 3 pages, one of four tokens, for each of four heads over two of keys."""
    config = shape(n_kv_heads=2)
    cache, x = Quest(budget=24, page_size=8, dense_layers=1).cache(config), torch.zeros(1, 2, 100, 32)
    for layer in range(2):
        for part in (slice(0, 99), slice(99, 100)):
            at = torch.arange(100)[None, part]
            cache.update(layer, x[:, :, part], x[:, :, part], x[:, :, part].repeat(1, 2, 1, 1), at)
    one = 2 * 32 * 4  # bytes of a token's keys, or values, of both heads
    dense, sparse = 2 * (2 * 100 * one), 2 * (2 * 12 * one + 2 * (2 * 8 + 4) * one)
    assert cache.read_bytes == dense + sparse
    held = [Quest(budget=24, page_size=8, dense_layers=layers).cache(config) for layers in (1, 0)]
    for made in held:
        made.update(0, x, x, x.repeat(1, 2, 1, 1), torch.arange(100)[None])
    assert [made.nbytes for made in held] == [2 * 100 * one, 2 * 100 * one + 2 * 13 * one]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"dense_layers": -1}, "dense_layers=-1 must be at least 0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Quest(**change)


# Claims


@torch.no_grad()
def test_claim_passkey(claim):
    """The text is read at once, what is asked token by token; the full cache finds them all."""
    (model, tokenizer), task, scores = testbed.subject(), testbed.tasks.task("needle"), []
    for sample in testbed.tasks.samples("needle", 2, 896, torch.Generator().manual_seed(0)):
        asked, cache = torch.tensor([tokenizer.encode(sample.question).ids]), Quest(budget=64).cache(model.config)
        model.hidden(torch.tensor([tokenizer.encode(sample.context).ids]), cache)
        ends = [tokenizer.token_to_id("Ċ")]
        said = generate(model, asked, task.ANSWER_TOKENS, stop=ends, cache=cache, prefill_chunk=1)[0].tolist()
        scores.append(task.score(tokenizer.decode(said).split("\n")[0], sample.answer))
    claim("quest", "passkey", statistics.fmean(scores))


def test_claim_planted_passkey(claim):
    """Facts at three depths that nobody asked for before the prompt's end; dropping them is what loses them."""
    model, facts = lookup_decoder(), [3, 8, 11]
    short = text(100, facts[:1], 100, facts[1:2], 100, facts[2:], 100)
    assert share_right(model, H2O(budget=64).cache(model.config), short, facts) == 0  # negative control
    prompt = text(1000, facts[:1], 4000, facts[1:2], 4000, facts[2:], 1000)
    claim(
        "quest",
        "planted-passkey",
        share_right(model, Quest(budget=64, dense_layers=0).cache(model.config), prompt, facts),
    )


def test_claim_memory_load(claim, generator):
    """The paper's shares at a sixteenth of its sizes: 4,096 tokens, of which 256 are read."""
    config = shape(n_heads=1, n_kv_heads=1)
    cache = Quest(budget=256, dense_layers=0).cache(config)
    k, v = draw(generator, config, 4096)
    for _ in feed(cache, config, k, v, [4095, 1]):
        pass
    claim("quest", "memory-load", (k.nbytes + v.nbytes) / cache.read_bytes)


class Listening(FullCache):
    """Keeps queries and keys of each layer."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def update(self, layer, k, v, queries, positions):
        self.heard.append((queries, k))
        return super().update(layer, k, v, queries, positions)


def recall(method, config, heard, prompt):
    """Of the ten tokens that each query after the prompt attends to most, the share that the method returns."""
    shares = []
    for queries, k in heard:
        cache = method.cache(config)
        cache.update(0, *[k[:, :, :prompt]] * 2, queries[:, :, :prompt], torch.arange(prompt)[None])
        for t in range(prompt, k.shape[2]):
            new = slice(t, t + 1)
            at = cache.update(0, k[:, :, new], k[:, :, new], queries[:, :, new], torch.tensor([[t]]))[2][0]
            keys = k[0, :, : t + 1].repeat_interleave(queries.shape[1] // k.shape[1], dim=0)
            best = (keys @ queries[0, :, t, :, None])[..., 0].topk(10, dim=1).indices
            at = at.repeat_interleave(queries.shape[1] // at.shape[0], dim=0)
            shares.append((best.unsqueeze(2) == at.unsqueeze(1)).any(dim=2).double().mean())
    return torch.stack(shares).mean()


@torch.no_grad()
def test_claim_recall(claim):
    """An eighth of 846 tokens, while the question for a needle and its answer are read; layers from the third on."""
    model, tokenizer = testbed.subject()
    (sample,) = testbed.tasks.samples("needle", 1, 896, torch.Generator().manual_seed(0))
    texts, listening = (sample.context, sample.question, sample.answer), Listening()
    context, *asked = (tokenizer.encode(text).ids for text in texts)
    model.hidden(torch.tensor([context + [token for ids in asked for token in ids]]), listening)
    ours, dropping = (
        recall(method, model.config, listening.heard[2:], len(context)) for method in (Quest(budget=112, dense_layers=0), H2O(budget=112))
    )  # fmt: skip
    claim("quest", "recall", float(ours - dropping))


@torch.no_grad()
def test_claim_language_modeling(claim):
    """An eighth of the text, of which the last 96 tokens are read one by one."""
    model = testbed.subject().model
    tokens = torch.as_tensor(testbed.corpus.tokens("held-out")[:513]).long()[None]
    cache, losses = Quest(budget=64).cache(model.config), []
    logits = run(model, tokens[:, :512], cache, [416] + [1] * 96)
    for found in (logits, model(tokens[:, :512])):
        losses.append(torch.nn.functional.cross_entropy(found[0, 416:], tokens[0, 417:]))
    claim("quest", "language-modeling", float((losses[0] - losses[1]).exp()))
