r"""Iteration-level scheduling: before each pass of the model it is decided anew who takes part in it.

Source: `orca` (Yu et al., OSDI 2022), Section 3.1 and Algorithm 1; `paged-attention` (arXiv 2309.06180), Section 4.5, for stores
that don't reserve: the latest to arrive gives up its memory first, all of it, and is computed again from its prompt and what it answered.

Differs from the paper: none of Algorithm 1 with a single worker.

Not here: workers in a pipeline (`n_workers`); swapping to another memory, the other way to preempt.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from refimpl.inference.system_level.journal import Journal
from refimpl.inference.system_level.protocol import Request, Served, Watch, weight_bytes
from refimpl.inference.system_level.selective_batching import Attend, Pass, read
from refimpl.model.model import Decoder


@dataclass(eq=False)
class Job:
    """A request on its way; it waits or runs.

    Attributes:
        index: of the request, in the order given.
        request: itself.
        text: its prompt and what was answered so far.
        read: tokens of the text whose keys and values the store has.
    """

    index: int
    request: Request
    text: list[int] = field(default_factory=list)
    read: int = 0

    @property
    def new(self) -> list[int]:
        """Tokens to be read in the next iteration."""
        return self.text[self.read :]


class Store(Protocol):
    """Where keys and values of all requests lie."""

    @property
    def held(self) -> int:
        """Bytes taken."""
        ...

    @property
    def used(self) -> int:
        """Bytes of them that hold tokens of those that run."""
        ...

    @property
    def resident(self) -> int:
        """Bytes on the device, those included that nobody has taken."""
        ...

    def order(self, waiting: list[Job]) -> list[Job]:
        """In which order those who wait are asked in; they come in order of arrival."""
        ...

    def admit(self, job: Job) -> bool:
        """Make room for all of the job's text, and set `read` to what of it is there already; False if there is no room."""
        ...

    def grow(self, job: Job) -> bool:
        """Make room for the one new token of a job that runs; False if there is none."""
        ...

    def release(self, job: Job) -> None:
        """The job has ended, or gives up its memory."""
        ...

    def attend_to(self, whole: Pass, running: list[Job]) -> Attend:
        """How these attend in the pass to come; writes their new keys and values."""
        ...

    def after(self, running: list[Job]) -> None:
        """The pass is over; `read` counts what was new in it."""
        ...


@torch.no_grad()
def iterate(
    model: Decoder, requests: Sequence[Request], slots: int, store: Store, watch: Watch | None = None
) -> Served:
    """Iteration-level scheduling (Algorithm 1) over a store.

    Args:
        model: the decoder.
        requests: checked before.
        slots: requests in an iteration at most.
        store: empty; it decides who fits in.
        watch: called with the store after each iteration, before those that ended release their memory.
    """
    weights = weight_bytes(model)
    journal = Journal(requests, slots, weights)
    coming = deque(sorted((Job(i, r, [*r.prompt]) for i, r in enumerate(requests)), key=_arrival))
    waiting: list[Job] = []  # those who have arrived, in order of arrival
    running: list[Job] = []  # the same
    while coming or waiting or running:
        if not waiting and not running:
            journal.clock = max(journal.clock, coming[0].request.arrival)
        while coming and coming[0].request.arrival <= journal.clock:
            waiting.append(coming.popleft())
        for job in make_room(running, store):
            journal.preemptions += 1
            insort(waiting, job, key=_arrival)
        for job in select(waiting, len(running), slots, store):
            journal.admit(job.index, prefill=len(job.new), found=job.read)
            waiting.remove(job)
            insort(running, job, key=_arrival)
        attend_to = partial(store.attend_to, running=running)
        assert running, "a store must have room for one request, if it is checked that it has"
        hidden = read(model, [job.new for job in running], [job.read for job in running], attend_to)
        for job, token in zip(running, model.logits(hidden).argmax(dim=-1).tolist(), strict=True):
            job.read = len(job.text)
            job.text.append(token)
            journal.token(job.index, token)
        store.after(running)
        ended = [job for job in running if job.request.ends(journal.answers[job.index])]
        for job in ended:
            journal.end(job.index)
        journal.iteration(running=len(running), held=store.held, used=store.used, device=weights + store.resident)
        if watch:
            watch(store)
        for job in ended:
            store.release(job)
        running = [job for job in running if job not in ended]
    return journal.served()


def select(waiting: list[Job], running: int, slots: int, store: Store) -> list[Job]:
    """Who joins (Algorithm 1, `Select`): those who have arrived, in order, up to the first that finds no slot or no room."""
    joining: list[Job] = []
    for job in store.order(waiting):
        if running + len(joining) == slots or not store.admit(job):
            break
        joining.append(job)
    return joining


def make_room(running: list[Job], store: Store) -> list[Job]:
    """Find room for the next token of each that runs, the earliest first, if need be by taking it from the latest.

    Args:
        running: in order of arrival; those that are made to wait are taken out.
        store: theirs.

    Returns:
        Those that have to be computed again; they keep what they answered.
    """
    preempted: list[Job] = []
    for job in list(running):
        while job in running and not store.grow(job):
            latest = running.pop()
            store.release(latest)
            latest.read = 0
            preempted.append(latest)
    return preempted


def _arrival(job: Job) -> tuple[int, int]:
    return job.request.arrival, job.index
