"""ContinuousBatching: Algorithm 1 by hand and on random traces, beside static batching."""

from dataclasses import replace

import pytest
import torch

from refimpl.inference.system_level.design.continuous_batching import ContinuousBatching, Reserved
from refimpl.inference.system_level.protocol import Request, entry_bytes
from refimpl.inference.system_level.scheduling import Job
from refimpl.inference.system_level.static_batching import StaticBatching
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from tests.inference.system_level.traces import trace


@pytest.fixture
def small(generator):
    """One narrow layer: what counts here is when, not what."""
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "d_ff": 8}
    return initialize_(Decoder(Config(vocabulary=61, **sizes)), generator)


def varying(generator, count=40, longest=40, between=1.5):
    """Requests of which most are short and some are long."""
    new = torch.empty(count).exponential_(0.1, generator=generator).long().clamp(1, longest).tolist()
    prompts = torch.randint(1, 13, (count,), generator=generator).tolist()
    arrivals = torch.empty(count).exponential_(1 / between, generator=generator).cumsum(0).long().tolist()
    return trace(generator, list(zip(prompts, new, arrivals, strict=True)))


def test_scheduled_by_hand(small):
    """Oracle: Algorithm 1 by hand: two slots, ten entries; requests take 4, 5, 6 and 2 entries and run 3, 1, 2 and 1 iterations.

    The third finds a slot at iteration 1, but 4 + 6 entries fill the memory exactly; the fourth must not overtake it, and waits for a slot.
    """
    requests = [
        Request(prompt=(5, 7), n=3),
        Request(prompt=(1,) * 5, n=1),
        Request(prompt=(2,) * 5, n=2),
        Request(prompt=(3, 4), n=1),
    ]
    served = ContinuousBatching(slots=2, memory=10).serve(small, requests)
    assert served.admitted == [0, 0, 1, 3] and served.ended == [2, 0, 2, 3]
    assert served.running == [2, 2, 2, 1] and served.utilization == 7 / 8 and served.waiting == 1.0
    each = entry_bytes(small.config, torch.float32)
    assert served.held == [9 * each, 10 * each, 10 * each, 2 * each]
    assert served.used == [7 * each, 8 * each, 10 * each, 2 * each]
    assert served.prefill_tokens == 14 and served.preemptions == 0


def test_a_request_without_room_is_not_overtaken(small):
    """Oracle: Algorithm 1: `Select` ends at the first that finds no room; the last would find it at once."""
    requests = [Request(prompt=(5,) * 4, n=3), Request(prompt=(1,) * 6, n=1), Request(prompt=(2,), n=1)]
    served = ContinuousBatching(slots=3, memory=8).serve(small, requests)
    assert served.admitted == [0, 3, 3] and served.ended == [2, 3, 3]
    assert ContinuousBatching(slots=3, memory=12).serve(small, requests).admitted == [0, 0, 1]
    assert ContinuousBatching(slots=3, memory=13).serve(small, requests).admitted == [0, 0, 0]


def test_reservation_is_exact(small):
    """Oracle: by hand: what is asked for at most, and given back in full."""
    store = Reserved(small, 9)
    jobs = [Job(i, Request(prompt=(5, 7), n=3), [5, 7]) for i in range(3)]
    assert [store.admit(job) for job in jobs] == [True, True, False] and store.free == 1
    store.release(jobs[0])
    assert store.free == 5 and store.admit(jobs[2])


def test_earlier_requests_have_run_as_often(small, claim, generator):
    """Oracle: the property, counted for all pairs at all iterations from the times of admission; control: a trace that breaks it."""
    violations = 0
    for _ in range(10):
        requests = varying(generator, count=10, longest=9)
        memory = max(request.entries for request in requests) + 10
        served = ContinuousBatching(slots=3, memory=memory).serve(small, requests)
        violations += overtaken(served)
        assert overtaken(replace(served, admitted=served.admitted[::-1]))
    claim("continuous-batching", "first-come-first-served", violations)


def overtaken(served):
    """Pairs in which the later one is ahead while the earlier one has not ended, over all iterations."""
    count, times = 0, list(zip(served.arrival, served.admitted, served.ended, strict=True))
    for clock in range(max(served.ended) + 1):
        ran = [max(0, min(clock, end) - start + 1) for _, start, end in times]
        going = [i for i, (arrival, _, end) in enumerate(times) if arrival <= clock <= end]
        count += sum(
            times[i][0] < times[j][0] and ran[i] < ran[j]
            for i in going
            for j in range(len(times))
            if times[j][2] >= clock
        )
    return count


def test_every_linear_layer_is_called_once_an_iteration(plain, claim, generator):
    """Oracle: calls, counted by hooks on every linear layer; their rows are all tokens of the iteration."""
    calls, rows = (
        dict.fromkeys((n for n, m in plain.named_modules() if "layers" in n and isinstance(m, torch.nn.Linear)), 0),
        [],
    )
    for name in calls:

        def count(module, given, name=name):
            calls[name] += 1
            rows.append(given[0].shape[:-1].numel())

        plain.get_submodule(name).register_forward_pre_hook(count)
    served = ContinuousBatching(slots=4).serve(plain, trace(generator))
    assert len(calls) == 14 and len({*calls.values()}) == 1 and min(rows[:14]) == max(rows[:14]) == 5 + 1 + 23
    claim("continuous-batching", "one-matrix", max(calls.values()) / served.iterations)


def test_beside_static_batching(small, claim, generator):
    """Oracle: static batching on the same trace, to which the invariants hold as well."""
    requests = varying(generator)
    mine, static = (
        method(slots=4, memory=1000).serve(small, requests) for method in (ContinuousBatching, StaticBatching)
    )
    assert mine.tokens == static.tokens
    assert mine.utilization > 1.4 * static.utilization
    claim("continuous-batching", "late-joining", mine.waiting / static.waiting)
    claim("continuous-batching", "early-finishing", mine.iterations / static.iterations)


def test_with_equal_lengths_nothing_is_gained(small, generator):
    """Oracle: the limiting case: requests that arrive together and are equally long are served the same."""
    requests = trace(generator, [(6, 5, 0)] * 8)
    mine, static = (method(slots=4).serve(small, requests) for method in (ContinuousBatching, StaticBatching))
    for name in ("admitted", "ended", "held", "utilization", "prefill_tokens"):
        assert getattr(mine, name) == getattr(static, name)
    assert mine.utilization == 1
