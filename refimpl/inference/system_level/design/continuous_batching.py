r"""Continuous batching (Orca): who takes part is decided before every iteration, so that requests come and go at once.

Source: `orca` (Yu et al., OSDI 2022), Algorithm 1 (`scheduling`) and Section 3 (S1: iteration-level scheduling; S2: selective
batching, `selective_batching`). No code was published.

Differs from the paper: memory is counted in entries that a cache can reach, prompt + n - 1, which is the paper's `max_tokens` less
the last new token, whose keys nobody reads. Layers with a sliding window reserve for the whole text, too.

Not here: workers in a pipeline (`n_workers` is 1), partitioned models, control messages apart from data; sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from refimpl.inference.system_level.protocol import Request, Served, Serving, Watch, check_requests, entry_bytes
from refimpl.inference.system_level.scheduling import Job, iterate
from refimpl.inference.system_level.selective_batching import Attend, Pass, separately
from refimpl.model.cache import FullCache
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class ContinuousBatching(Serving):
    """First come, first served, iteration by iteration; a request joins if its whole cache can be reserved.

    Args:
        slots: requests in an iteration at most, `max_bs`.
        memory: entries that may be reserved together, `n_slots`.

    Examples:
        >>> import torch
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> requests = [Request(prompt=(5, 7), n=4), Request(prompt=(8,), n=1), Request(prompt=(9,), n=3)]
        >>> served = ContinuousBatching(slots=2).serve(model, requests)
        >>> served.admitted, served.ended, served.iterations  # the third takes the place of the second
        ([0, 0, 1], [3, 0, 3], 4)
    """

    slots: int = 8
    memory: int = 4096

    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests; see `protocol.Serving.serve`."""
        check_requests(model, requests, self.slots, self.memory)
        return iterate(model, requests, self.slots, Reserved(model, self.memory), watch)


class Reserved:
    """A store of contiguous caches, each as long as its request may get.

    Args:
        model: gives layers, dtype and device.
        memory: entries that all may reserve together.
    """

    def __init__(self, model: Decoder, memory: int) -> None:
        self.free = memory
        self._caches: dict[Job, FullCache] = {}
        self._entry = entry_bytes(model.config, model.embedding.weight.dtype)

    @property
    def held(self) -> int:
        """Bytes of all buffers."""
        return sum(cache.nbytes for cache in self._caches.values())

    @property
    def used(self) -> int:
        """Bytes of the entries that were written."""
        return self._entry * sum(cache.length for cache in self._caches.values())

    @property
    def resident(self) -> int:
        """Buffers are made for a request, and freed when it ends."""
        return self.held

    def order(self, waiting: list[Job]) -> list[Job]:
        """As they came."""
        return waiting

    def admit(self, job: Job) -> bool:
        """Reserve for the longest answer."""
        if job.request.entries > self.free:
            return False
        self.free -= job.request.entries
        self._caches[job] = FullCache(reserve=job.request.entries)  # of windows, too, all is kept
        return True

    def grow(self, job: Job) -> bool:  # noqa: ARG002 - the protocol's
        """It was reserved."""
        return True

    def release(self, job: Job) -> None:
        """Give back what was reserved."""
        self.free += job.request.entries
        del self._caches[job]

    def attend_to(self, whole: Pass, running: list[Job]) -> Attend:
        """Each against its own cache."""
        return separately(whole, [self._caches[job] for job in running])

    def after(self, running: list[Job]) -> None:
        """Nothing."""
