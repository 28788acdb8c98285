"""Iteration-level scheduling over a store that has little to say. Oracle: by hand."""

import torch

from refimpl.inference.system_level.protocol import Request
from refimpl.inference.system_level.scheduling import Job, iterate, make_room, select
from refimpl.inference.system_level.selective_batching import separately
from refimpl.model.cache import FullCache
from tests.inference.system_level.traces import alone, trace


class Counted:
    """A store of so many entries that takes them one by one, as a paged one with blocks of one token does."""

    def __init__(self, entries, backwards=False):
        self.free, self.backwards, self.taken, self.caches, self.log = entries, backwards, {}, {}, []

    @property
    def held(self):
        return sum(self.taken.values())

    used = resident = held

    def order(self, waiting):
        return waiting[::-1] if self.backwards else waiting

    def admit(self, job):
        if len(job.text) > self.free:
            return False
        self.free -= len(job.text)
        self.taken[job], self.caches[job] = len(job.text), FullCache()
        return True

    def grow(self, job):
        if not self.free:
            return False
        self.free -= 1
        self.taken[job] += 1
        return True

    def release(self, job):
        self.free += self.taken.pop(job)
        del self.caches[job]
        self.log.append(job.index)

    def attend_to(self, whole, running):
        return separately(whole, [self.caches[job] for job in running])

    def after(self, running):
        assert all(job.read == len(job.text) - 1 for job in running)


def test_the_latest_gives_up_its_memory_and_is_computed_again(plain):
    """Oracle: by hand: two requests of one token and seven new ones in eight entries. Both hold four after four iterations; then the
    first takes the second's room, and the second reads five tokens again when the first is done.
    """
    requests = [Request(prompt=(5,), n=7), Request(prompt=(8,), n=7)]
    store = Counted(8)
    served = iterate(plain, requests, 2, store)
    assert served.running == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1] and store.log == [1, 0, 1]
    assert served.preemptions == 1 and served.prefill_tokens == 1 + 1 + 5
    assert served.admitted == served.first == [0, 0] and served.ended == [6, 9]
    assert served.held == [2, 4, 6, 8, 5, 6, 7, 5, 6, 7] and store.free == 8
    assert served.tokens == [alone(plain, request) for request in requests]


def test_who_was_preempted_is_not_overtaken(plain):
    """Oracle: by hand: as before, and a third of one token waits for a slot. Three entries are free while the second, which came before
    it, waits for five; both join when the first is done.
    """
    requests = [Request(prompt=(5,), n=7), Request(prompt=(8,), n=7), Request(prompt=(9,), n=1)]
    served = iterate(plain, requests, 2, Counted(8))
    assert served.preemptions == 1 and served.admitted == [0, 0, 7] and served.ended == [6, 9, 7]


def test_one_that_finds_no_room_itself_waits(plain):
    """Oracle: by hand: the latest can take from nobody but itself."""
    store = Counted(3)
    jobs = [Job(i, Request(prompt=(5,), n=3), [5]) for i in range(3)]
    assert all(store.admit(job) for job in jobs)
    for job in jobs:
        job.text.append(6)
        job.read = 1
    running = list(jobs)
    assert make_room(running, store) == [jobs[2], jobs[1]] and running == [jobs[0]]
    assert jobs[1].read == jobs[2].read == 0 and store.free == 1


def test_a_store_may_ask_for_another_order(plain, generator):
    """Oracle: by hand: of three that wait the last is taken first; one slot."""
    requests = trace(generator, [(2, 2, 0), (3, 2, 0), (4, 2, 1)])
    assert iterate(plain, requests, 1, Counted(10)).admitted == [0, 2, 4]
    served = iterate(plain, requests, 1, Counted(10, backwards=True))
    assert served.admitted == [4, 0, 2]
    assert served.tokens == [alone(plain, request) for request in requests]


def test_who_joins():
    """Oracle: Algorithm 1's `Select`, by hand: slots and room."""
    jobs = [Job(i, Request(prompt=(5,) * size, n=1), [5] * size) for i, size in enumerate((2, 9, 1, 1))]

    def joining(slots, entries, running=0):
        return [job.index for job in select(jobs, running, slots, Counted(entries))]

    assert joining(4, 13) == [0, 1, 2, 3] and joining(4, 10) == [0]
    assert joining(4, 13, running=2) == [0, 1] and joining(1, 13, running=1) == []


def test_nobody_joins_before_arriving(plain):
    """Oracle: by hand: slots and room for all; the second comes while the first runs, the third too late for it."""
    requests = [Request(prompt=(5,), n=4), Request(prompt=(8,), n=1, arrival=2), Request(prompt=(9,), n=1, arrival=5)]
    assert iterate(plain, requests, 4, Counted(20)).admitted == [0, 2, 5]


def test_the_clock_jumps_while_nobody_is_there(plain):
    """Oracle: by hand."""
    requests = [Request(prompt=(5,), n=1, arrival=4), Request(prompt=(8,), n=2, arrival=90)]
    served = iterate(plain, requests, 2, Counted(9))
    assert served.admitted == [4, 90] and served.ended == [4, 91] and served.iterations == 3


def test_no_gradient_is_kept(generator):
    """Oracle: keys and values that the store holds."""
    from refimpl.model.config import Config
    from refimpl.model.model import Decoder, initialize_
    from tests.inference.system_level.conftest import SIZES

    model, store, seen = initialize_(Decoder(Config(**SIZES)), generator), Counted(9), []
    iterate(model, [Request(prompt=(5,), n=2)], 1, store, lambda held: seen.extend(held.caches.values()))
    assert seen and not any(
        x.requires_grad for cache in seen for layer in cache._layers.values() for x in (layer.k, layer.v)
    )
    assert torch.is_grad_enabled()
