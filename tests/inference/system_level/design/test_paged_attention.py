"""PagedAttention: attention over blocks against contiguous attention, preemption by hand, a crowd of requests without a leak, and what
memory is used for.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.system_level import scheduling
from refimpl.inference.system_level.blocks import Blocks
from refimpl.inference.system_level.design.continuous_batching import ContinuousBatching
from refimpl.inference.system_level.design.paged_attention import Paged, PagedAttention, paged_attention
from refimpl.inference.system_level.paged_cache import PagedCache
from refimpl.inference.system_level.protocol import Request, entry_bytes
from refimpl.model.beam import beam_search
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from tests.inference.system_level import crowd
from tests.inference.system_level.conftest import SIZES
from tests.inference.system_level.traces import alone, trace

# The kernel


@pytest.mark.parametrize("lengths", [[1], [16, 17, 3, 33, 1]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("partition", [1, 16, 512])
def test_blocks_anywhere_give_contiguous_attention(generator, lengths, heads, kv_heads, partition):
    """Oracle: softmax over the contiguous keys, written out in float64; blocks in a random order, with others' in between.

    With and without a window and a bias. What stands behind a sequence's end counts for nothing.
    """
    rows, size, dim, longest = len(lengths), 16, 8, -(-max(lengths) // 16)
    keys, values = (
        100 * torch.randn(2 * rows * longest, size, kv_heads, dim, generator=generator).double() for _ in range(2)
    )
    keys /= 100
    tables = torch.randperm(len(keys), generator=generator)[: rows * longest].view(rows, longest)
    q = torch.randn(rows, heads, dim, generator=generator).double()
    bias = torch.randn(1, heads, longest * size, generator=generator).double()
    for window, added in itertools.product((None, 3), (None, bias)):
        found = paged_attention(
            q, keys, values, tables, torch.tensor(lengths), window=window, bias=added, partition=partition
        )
        for row, length in enumerate(lengths):
            low = 0 if window is None else max(0, length - window)
            for head in range(heads):
                k, v = (
                    x[tables[row], :, head // (heads // kv_heads)].flatten(0, 1)[low:length] for x in (keys, values)
                )
                scores = k @ q[row, head] / dim**0.5 + (0 if added is None else added[0, head, low:length])
                assert_close(found[row, head], scores.softmax(-1) @ v)


def test_the_table_is_followed(generator):
    """Negative control: another block in the table, or one token less, is another result; a block behind the end is not."""
    keys, values = (torch.randn(4, 2, 1, 4, generator=generator) for _ in range(2))
    q = torch.randn(1, 2, 4, generator=generator)

    def found(table, length):
        return paged_attention(q, keys, values, torch.tensor([table]), torch.tensor([length]))

    assert not torch.allclose(found([0, 1], 4), found([0, 2], 4)) and not torch.allclose(
        found([0, 1], 4), found([0, 1], 3)
    )
    assert torch.equal(found([0, 1], 2), found([0, 3], 2))


def test_half_precision(generator):
    """Oracle: the same numbers in float64, to bfloat16's rounding of the result."""
    keys, values = (torch.randn(9, 16, 2, 8, generator=generator).bfloat16() for _ in range(2))
    q, tables, lengths = (
        torch.randn(1, 4, 8, generator=generator).bfloat16(),
        torch.tensor([[5, 2, 7]]),
        torch.tensor([40]),
    )
    found = paged_attention(q, keys, values, tables, lengths)
    exact = paged_attention(q.double(), keys.double(), values.double(), tables, lengths)
    assert found.dtype == torch.bfloat16
    assert_close(found, exact.bfloat16())


# Serving


def test_the_latest_is_preempted_by_hand(plain):
    """Oracle: by hand, blocks of four, six of them: both prompts of 8 take two. At iteration 1 each needs a third; at iteration 5 the first
    needs a fourth and takes the second's; the second, 12 + 1 tokens, waits until the first is done, and is read again whole.
    """
    requests = [Request(prompt=(5,) * 8, n=9), Request(prompt=(8,) * 8, n=9)]
    served = PagedAttention(memory=25, block_size=4).serve(plain, requests)
    block = 4 * entry_bytes(plain.config, torch.float32)
    assert served.preemptions == 1 and served.running == [2] * 5 + [1] * 4 + [1] * 4
    assert served.admitted == [0, 0] and served.ended == [8, 12] and served.prefill_tokens == 8 + 8 + 13
    assert [held // block for held in served.held] == [4, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4]
    assert served.used[:6] == [n * block // 4 for n in (16, 18, 20, 22, 24, 13)]
    assert served.tokens == [alone(plain, request) for request in requests]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_blocks_of_any_size(plain, generator, block_size):
    """Oracle: `generate`; waste is below a block for each request."""
    requests, each = trace(generator), entry_bytes(plain.config, torch.float32)
    served = PagedAttention(slots=4, memory=48, block_size=block_size).serve(plain, requests)
    assert served.tokens == [alone(plain, request) for request in requests]
    for held, used, running in zip(served.held, served.used, served.running, strict=True):
        assert held % (block_size * each) == 0 and (held - used) // each <= running * (block_size - 1)


def test_the_pool_is_the_memory_and_books_agree(plain, generator):
    """Oracle: bytes of the pool's tensors; blocks whose count is above 0; all are free at the end."""
    seen = []

    def watch(store):
        taken = sum(count > 0 for count in store.blocks.counts)
        assert store.held == taken * store.pool.block_bytes
        assert store.pool.keys.nbytes + store.pool.values.nbytes == 3 * store.pool.block_bytes
        seen.append(store)

    PagedAttention(memory=50).serve(plain, trace(generator), watch)
    assert seen[-1].blocks.free == 3 and not any(seen[-1].blocks.counts)


def crowded(monkeypatch, count):
    """Serve so many random requests by eight slots and 30 blocks of four: the store, what was served, and what it should have been."""
    store, (requests, answers) = Paged(crowd.MODEL, 30, 4), crowd.crowd(count, every=1.2)

    def places(job):
        table = store.blocks.tables[store._sequences[job]].blocks
        return [place for block in table for place in range(4 * block, 4 * block + 4)]

    return store, crowd.serve(monkeypatch, store, places, requests, answers, slots=8), answers


def test_a_hundred_thousand_requests_leave_nothing(monkeypatch):
    """Oracle: what was drawn: every answer is given once and whole, and the text that it ends is in the memory, entry by entry, though
    requests had to give theirs up again and again. At the end every block is free, once, and stands in no table.
    """
    store, served, answers = crowded(monkeypatch, 100_000)
    assert served.tokens == answers
    blocks = store.blocks
    assert sorted(blocks._free) == [*range(30)] and blocks.counts == [0] * 30 and store.held == store.used == 0
    assert not blocks.tables and not store._sequences
    assert served.preemptions > 5_000 and served.peak_bytes == 30 * store.pool.block_bytes  # the memory was too small
    assert sum(len(answer) < crowd.ASKED for answer in answers) > 50_000 and served.waiting > 1


def test_one_block_lost_in_one_preemption_is_seen(monkeypatch):
    """Negative control of the last: the first that gives up its memory keeps a block, and all else goes on as it was."""
    release, kept = Paged.release, []

    def forgetful(store, job):
        if not kept and not job.request.ends(job.text[len(job.request.prompt) :]):
            kept.append(store.blocks.tables[store._sequences[job]].blocks.pop())
        release(store, job)

    monkeypatch.setattr(Paged, "release", forgetful)
    store, served, answers = crowded(monkeypatch, 3_000)
    assert served.tokens == answers and served.preemptions > 100
    assert store.blocks.free == 29 and [block for block in range(30) if store.blocks.counts[block]] == kept


def test_one_block_given_to_two_is_seen(monkeypatch):
    """Negative control of the last but one: a block that is free twice."""
    close = Blocks.close

    def generous(blocks, sequence):
        first = blocks.tables[sequence].blocks[0]
        close(blocks, sequence)
        blocks._free.append(first)
        monkeypatch.setattr(Blocks, "close", close)

    monkeypatch.setattr(Blocks, "close", generous)
    with pytest.raises(AssertionError):
        crowded(monkeypatch, 1_000)


def test_distances_added_to_scores(generator):
    """Oracle: `generate` with the same bias on the decoder (ALiBi's form)."""
    model = initialize_(Decoder(Config(**SIZES)), generator, std=0.3)
    requests = trace(generator)
    without = [alone(model, request) for request in requests]
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]).view(1, 4, 1, 1)
    model.score_bias = lambda queries, keys: -slopes * (queries - keys)
    found = PagedAttention(block_size=4).serve(model, requests).tokens
    assert found == [alone(model, request) for request in requests] != without


def test_bad_settings_and_foreign_attention(plain):
    requests = [Request(prompt=(5,), n=1)]
    for settings, message in (
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"memory": 15}, "memory=15 hold a block"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedAttention(**settings).serve(plain, requests)
    with pytest.raises(ValueError, match="take 34 entries, and the memory holds 32"):
        PagedAttention(memory=40).serve(plain, [Request(prompt=(5,) * 34, n=1)])
    plain.layers[1].attention.attend = lambda q, k, v, **_: q
    with pytest.raises(ValueError, match=r"layers\[1\].attention.attend is replaced"):
        PagedAttention().serve(plain, requests)


# What memory is used for


@pytest.fixture(scope="module")
def chats():
    """120 requests whose prompts have 161 tokens and answers 338 on average (the paper's Figure 11), all there at once, served without
    computing: an answer ends where it was drawn to end. Clients ask for as much as fits into 2048 tokens.
    """
    generator = torch.Generator().manual_seed(0)

    def lengths(mean, most):
        return torch.empty(120).exponential_(1 / mean, generator=generator).long().clamp(4, most).tolist()

    prompts, answers = lengths(161, 1000), lengths(338, 1000)
    requests = [Request(prompt=(0,) * p, n=2049 - p, stop=frozenset({1})) for p in prompts]

    def read(model, texts, starts, attend_to):
        jobs = attend_to.keywords["running"]
        return torch.tensor([len(job.text) + 1 - len(job.request.prompt) == answers[job.index] for job in jobs])

    weight = torch.zeros(1)
    config = Config(vocabulary=2, d_model=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2)
    model = SimpleNamespace(config=config, embedding=SimpleNamespace(weight=weight), layers=[], parameters=lambda: [weight], logits=lambda ended: torch.nn.functional.one_hot(ended.long(), 2))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling, "read", read)
        yield SimpleNamespace(model=model, requests=requests, prompts=prompts, answers=answers)


def serve(chats, method, watch=None):
    served = method.serve(chats.model, chats.requests, watch)
    assert [len(answer) for answer in served.tokens] == chats.answers
    return served


def test_what_memory_is_used_for(chats, claim):
    """Oracle: closed forms. A sequence of any length wastes 7.5 of 16 entries on average; contiguous caches have what was reserved for
    each at each of its iterations, and of it what was written, which lengths alone tell.
    """
    most = []

    def watch(store):
        most.append(max(len(table.blocks) * 16 - table.length for table in store.blocks.tables.values()))

    mine = serve(chats, PagedAttention(slots=500, memory=12_000), watch)
    each, running = entry_bytes(chats.model.config, torch.float32), sum(mine.running)
    assert (sum(mine.held) - sum(mine.used)) / each / running == pytest.approx(7.5, rel=0.05)
    claim("paged-attention", "waste-below-a-block", max(most))
    claim("paged-attention", "near-zero-waste", mine.share_used)

    written = sum(p * n + n * (n - 1) // 2 for p, n in zip(chats.prompts, chats.answers, strict=True))
    taken = sum(request.entries * n for request, n in zip(chats.requests, chats.answers, strict=True))
    claim("paged-attention", "reservation-wastes", written / taken)
    reserved = serve(chats, ContinuousBatching(slots=500, memory=12_000))
    claim("paged-attention", "more-requests-at-once", mine.utilization / reserved.utilization)


def test_contiguous_memory_is_torn_by_gaps(chats):
    """Oracle: a first-fit memory of 12,000 entries written here, whose requests reserve what they will really write, as if it were known.

    Control of external fragmentation: it refuses requests although more entries are free than they ask for. Blocks never do.
    """
    free, running, torn = [(0, 12_000)], [], 0
    for index, (p, n) in enumerate(zip(chats.prompts, chats.answers, strict=True)):
        size = p + n - 1
        while True:
            hole = next((hole for hole in free if hole[1] - hole[0] >= size), None)
            if hole is not None:
                break
            torn += sum(end - start for start, end in free) >= size
            done = min(running)
            running.remove(done)
            edges = sorted([*free, done[1]])
            free = []
            for start, end in edges:
                if free and free[-1][1] == start:
                    free[-1] = (free[-1][0], end)
                else:
                    free.append((start, end))
        free.remove(hole)
        free = sorted([*free, (hole[0] + size, hole[1])])
        running.append((index + n / 10, (hole[0], hole[0] + size)))
    assert torn > 5


def test_sharing_saves_memory(plain, claim, generator):
    """Oracle: blocks counted: those in the tables, less those taken, over those in the tables; summed over all steps.

    Samples share their prompt; beams share what they have written, too, as long as they agree.
    """
    prompt = torch.randint(61, (1, 20), generator=generator)
    saved = {}
    for name in ("samples", "beams"):
        cache, counts = PagedCache(plain.config, 1000, block_size=4, like=plain.norm.weight), []
        update = cache.update

        def counted(layer, *given, update=update, cache=cache, counts=counts):
            found = update(layer, *given)
            tables = [len(table.blocks) for table in cache.blocks.tables.values()]
            if len(tables) > 1:
                counts.append((sum(tables) - cache.blocks.taken, sum(tables)))
            return found

        cache.update = counted
        if name == "beams":
            beam_search(plain, prompt, 40, 4, cache=cache)
        else:
            with torch.no_grad():
                plain.hidden(prompt[:, :-1], cache)
            cache.select([0] * 4)
            generate(plain, prompt[:, -1:].expand(4, 1), 40, temperature=1.0, generator=generator, cache=cache)
        saved[name] = sum(x for x, _ in counts) / sum(y for _, y in counts)
    assert 0.05 < saved["samples"] < saved["beams"] < 0.75
    claim("paged-attention", "beams-share-more", saved["beams"] / saved["samples"])
