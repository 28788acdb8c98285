"""PrefixCaching: hits against brute force and the optimum, order, eviction, and answers as they are without it."""

import random
from dataclasses import replace

import pytest
import torch

from refimpl.inference.system_level.design.continuous_batching import ContinuousBatching
from refimpl.inference.system_level.optimization.prefix_caching import PrefixCaching, Remembering
from refimpl.inference.system_level.protocol import Request, entry_bytes
from refimpl.inference.system_level.scheduling import Job
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from tests.inference.system_level import crowd
from tests.inference.system_level.traces import alone, common


@pytest.fixture
def small(generator):
    """One narrow layer: what counts here is what is computed, not what comes out."""
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "d_ff": 8}
    return initialize_(Decoder(Config(vocabulary=61, **sizes)), generator)


def family(seed=0, branches=(3, 3, 3), edge=6, n=1):
    """Requests whose prompts are the leaves of a tree, shuffled: each edge is a run of tokens, siblings differ in its first."""
    rng = random.Random(seed)
    prompts = [()]
    for width in branches:
        prompts = [
            (*prompt, first, *(rng.randrange(61) for _ in range(edge - 1)))
            for prompt in prompts
            for first in rng.sample(range(61), width)
        ]
    rng.shuffle(prompts)
    return [Request(prompt=prompt, n=n) for prompt in prompts]


def fewest(requests):
    """Tokens that have to be computed at least: the distinct beginnings of all prompts."""
    return len({request.prompt[:i] for request in requests for i in range(1, len(request.prompt) + 1)})


def test_hits_are_the_longest_common_prefix(small):
    """Oracle: brute force: with memory for all, one request at a time computes what it shares with none of the earlier ones, and at least
    one token; earlier texts include their answers.
    """
    rng, texts, expected, requests = random.Random(1), [], [], []
    for i in range(30):
        base = rng.choice(texts)[: rng.randint(0, 20)] if texts and rng.random() < 0.7 else []
        prompt = [*base, *(rng.randrange(3) for _ in range(rng.randint(0 if base else 1, 5)))]
        request = Request(prompt=tuple(prompt), n=3, arrival=10 * i)
        shared = max((common(prompt[:-1], text) for text in texts), default=0)
        requests.append(request)
        expected.append(len(prompt) - shared)
        texts.append(prompt + alone(small, request)[:-1])
    served = PrefixCaching().serve(small, requests)
    whole = sum(len(request.prompt) for request in requests)
    assert served.prefill_tokens == sum(expected) < 0.6 * whole and served.hit_rate == 1 - sum(expected) / whole


def test_the_optimum_is_reached_with_memory_for_a_single_request(small, claim):
    """Oracle: theorem: each edge of the tree of all prompts is computed once (Theorem 3.1), counted as a set of beginnings.

    Negative control: in order of arrival, in the same memory, more is computed.
    """
    worst = 0.0
    for seed in range(4):
        requests = family(seed)
        method = PrefixCaching(slots=1, memory=max(request.entries for request in requests))
        served = method.serve(small, requests)
        worst = max(worst, served.prefill_tokens / fewest(requests))
        assert replace(method, schedule="arrival").serve(small, requests).prefill_tokens > 1.3 * fewest(requests)
    claim("prefix-caching", "optimal-order", worst)


def test_the_order_matters_where_memory_is_scarce(small, claim):
    """Oracle: the same requests in order of arrival, several at a time, answers of eight tokens."""
    requests = family(branches=(4, 3, 3), n=8)
    mine, arrival = (
        PrefixCaching(slots=3, memory=110, schedule=s).serve(small, requests) for s in ("longest-prefix", "arrival")
    )
    assert mine.tokens == arrival.tokens
    claim("prefix-caching", "longest-prefix-first", mine.prefill_tokens / arrival.prefill_tokens)


def test_shared_prompts_are_read_once(small, claim, generator):
    """Oracle: by hand: 20 questions of 8 tokens behind the same 64, which the first reads: 64 + 20 * 8 tokens of 20 * 72 are computed."""
    preamble = torch.randint(61, (64,), generator=generator).tolist()
    requests = [
        Request(prompt=(*preamble, i, *torch.randint(61, (7,), generator=generator).tolist()), n=2, arrival=min(i, 1))
        for i in range(20)
    ]
    served, without = (method(memory=400).serve(small, requests) for method in (PrefixCaching, ContinuousBatching))
    assert served.prefill_tokens == 64 + 20 * 8 and without.prefill_tokens == 20 * 72
    assert served.hit_rate == 19 * 64 / (20 * 72) and without.hit_rate == 0
    claim("prefix-caching", "hit-rate", 1 - served.prefill_tokens / without.prefill_tokens)
    claim("prefix-caching", "held-once", max(served.used) / max(without.used))
    assert max(served.running) == 8 > 5 == max(without.running)


def test_requests_of_one_iteration_end_up_with_one_copy(small):
    """Oracle: by hand: both read all six tokens, since neither was there; then they hold five together, and one and one more each."""
    requests = [Request(prompt=(1, 2, 3, 4, 5, 6), n=2), Request(prompt=(1, 2, 3, 4, 5, 7), n=2)]
    served = PrefixCaching(memory=20).serve(small, requests)
    each = entry_bytes(small.config, torch.float32)
    assert served.prefill_tokens == 12 and served.used == [7 * each, 9 * each] and served.held == [7 * each, 9 * each]


def test_who_waits_is_sorted_by_what_is_there(small):
    """Oracle: by hand: one slot; the last to come matches four tokens, the third two, the second none."""
    requests = [Request(prompt=prompt, n=1) for prompt in ((1, 2, 3, 4, 5), (9, 8, 7), (1, 2, 9), (1, 2, 3, 4, 6))]
    assert PrefixCaching(slots=1).serve(small, requests).admitted == [0, 3, 2, 1]
    assert PrefixCaching(slots=1, schedule="arrival").serve(small, requests).admitted == [0, 1, 2, 3]


def test_the_oldest_leaf_is_evicted(small):
    """Oracle: by hand: ten entries; the third prompt needs the room of the first, so that the first, asked again, is read anew, and the
    second, which was used since, is not.
    """
    first, second, third = (1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 9, 9)
    requests = [
        Request(prompt=prompt, n=1, arrival=i) for i, prompt in enumerate((first, second, third, second, first))
    ]
    assert PrefixCaching(memory=10).serve(small, requests).prefill_tokens == 4 + 4 + 4 + 1 + 4
    assert PrefixCaching(memory=13).serve(small, requests).prefill_tokens == 4 + 4 + 4 + 1 + 1


def test_preempted_requests_find_what_they_left(small, generator):
    """Oracle: `generate`; and what is read again is less than where all is thrown away: the first takes entries one by one."""
    requests = [Request(prompt=(5, 7, 9), n=14), Request(prompt=(8, 1, 2), n=14)]
    served = PrefixCaching(memory=20).serve(small, requests)
    assert served.preemptions >= 1 and served.tokens == [alone(small, request) for request in requests]
    assert served.hit_rate == 0  # what is found again was no hit when it came


def test_books_agree(plain, generator):
    """Oracle: places of all nodes of the tree, those in hands of requests, and the free ones are all places, each once."""
    requests = [replace(request, arrival=i) for i, request in enumerate(family(branches=(2, 2, 3), edge=3, n=6))]

    def watch(store):
        inside, stack = [], [store.tree.root]
        while stack:
            node = stack.pop()
            inside += node.places
            stack += node.children.values()
            assert len(node.places) == len(node.tokens) and all(
                child.parent is node for child in node.children.values()
            )
        outside = {place for holding in store._holding.values() for place in holding.places} - {*inside}
        assert sorted([*inside, *outside, *store._free]) == list(range(40)) and len(inside) == store.tree.size

    served = PrefixCaching(slots=4, memory=40).serve(plain, requests, watch)
    assert served.tokens == [alone(plain, request) for request in requests]


@pytest.mark.slow
def test_fifty_thousand_requests_leave_nothing(monkeypatch):
    """Oracle: what was drawn, as for `paged-attention`: every answer whole, and its text in the memory, of which others have a part, too, and
    which is given up from the tree's leaves or by those who came last. At the end nobody uses the tree; without it every entry is free, once.
    """
    store, (requests, answers) = Remembering(crowd.MODEL, 100, "longest-prefix"), crowd.crowd(50_000, every=1.2)
    served = crowd.serve(monkeypatch, store, lambda job: store._holding[job].places, requests, answers, slots=8)
    assert served.tokens == answers
    assert store.used == store.tree.locked == 0 and not store._holding and not store._joined
    assert store.tree.size + len(store._free) == 100
    store.forget()
    assert sorted(store._free) == [*range(100)] and store.tree.size == 0 and not store.tree.root.children
    assert served.preemptions > 1_000 and served.hit_rate > 0.2


def test_an_entry_that_was_not_written_is_free_again(small):
    """Oracle: by hand: of ten entries the tree keeps the three that were read, and the one for the token to come is given back."""
    store, job = Remembering(small, 10, "arrival"), Job(0, Request(prompt=(5, 7, 9), n=3), [5, 7, 9])
    assert store.admit(job)
    job.read, job.text = 3, [5, 7, 9, 2]
    assert store.grow(job) and len(store._free) == 6
    store.release(job)
    assert len(store._free) == 7 and store.tree.size == 3 and store.tree.locked == 0


def test_settings_are_checked(small):
    with pytest.raises(ValueError, match="schedule='fair' must be one of longest-prefix, arrival"):
        PrefixCaching(schedule="fair").serve(small, [Request(prompt=(5,), n=1)])
    small.layers[0].attention.attend = lambda q, k, v, **_: q
    with pytest.raises(ValueError, match="attend is replaced"):
        PrefixCaching().serve(small, [Request(prompt=(5,), n=1)])
