r"""Static batching: a batch is put together, read and decoded to its end; what the other ways of serving are held against.

Whoever has arrived joins, in order of arrival, while there are slots and memory. Prompts are padded to the longest, and a contiguous
cache is reserved for each at the greatest length that the batch may reach. Requests that have ended keep their slot, and are computed
on; all answers are given when the last is done.

Source: `orca` (Yu et al., OSDI 2022), Section 2, describes it as what serving systems did before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refimpl.inference.system_level.journal import Journal
from refimpl.inference.system_level.protocol import (
    Request,
    Served,
    Serving,
    Watch,
    check_requests,
    entry_bytes,
    weight_bytes,
)
from refimpl.model.cache import FullCache
from refimpl.model.generate import pad
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class StaticBatching(Serving):
    """Batches of whole requests.

    Args:
        slots: requests of a batch at most.
        memory: entries that a batch's cache may have.
    """

    slots: int = 8
    memory: int = 4096

    @torch.no_grad()
    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests; see `protocol.Serving.serve`."""
        check_requests(model, requests, self.slots, self.memory)
        journal = Journal(requests, self.slots, weight_bytes(model))
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival)
        while waiting:
            journal.clock = max(journal.clock, requests[waiting[0]].arrival)
            batch = self._batch(requests, [i for i in waiting if requests[i].arrival <= journal.clock])
            waiting = [i for i in waiting if i not in batch]
            self._run(model, requests, batch, journal, watch)
        return journal.served()

    def _batch(self, requests: Sequence[Request], arrived: list[int]) -> list[int]:
        """The first of those who have arrived, as many as there is room for."""
        for size in range(min(self.slots, len(arrived)), 1, -1):
            if size * reserved([requests[i] for i in arrived[:size]]) <= self.memory:
                return arrived[:size]
        return arrived[:1]

    def _run(
        self, model: Decoder, requests: Sequence[Request], batch: list[int], journal: Journal, watch: Watch | None
    ) -> None:
        """Decode a batch until its last request has ended."""
        device = model.embedding.weight.device
        tokens, padding = (x.to(device) for x in pad([requests[i].prompt for i in batch]))
        cache = FullCache(reserve=reserved([requests[i] for i in batch]))  # of windows, too, all is kept: masks hide it
        each = entry_bytes(model.config, model.embedding.weight.dtype)
        going = list(batch)
        for i in batch:
            journal.admit(i, prefill=tokens.shape[1])
        while going:
            tokens = model.logits(model.hidden(tokens, cache, padding)[:, -1]).argmax(dim=-1, keepdim=True)
            ran, used = len(going), each * sum(len(requests[i].prompt) + len(journal.answers[i]) for i in going)
            for i, token in zip(batch, tokens.flatten().tolist(), strict=True):
                if i in going:
                    journal.token(i, token)
            going = [i for i in going if not requests[i].ends(journal.answers[i])]
            if not going:
                for i in batch:
                    journal.end(i)
            journal.iteration(running=ran, held=cache.nbytes, used=used)
            if watch:
                watch(Held(cache))
        cache.reset()


@dataclass(frozen=True)
class Held:
    """The cache of a batch, as `protocol.Watch` is shown it."""

    cache: FullCache

    @property
    def held(self) -> int:
        """Bytes of all buffers."""
        return self.cache.nbytes


def reserved(batch: Sequence[Request]) -> int:
    """Entries reserved for each request of a batch: the longest padded prompt and the longest answer.

    Examples:
        >>> reserved([Request(prompt=(5, 7, 9), n=2), Request(prompt=(8,), n=10)])
        12
    """
    return max(len(request.prompt) for request in batch) + max(request.n for request in batch) - 1
