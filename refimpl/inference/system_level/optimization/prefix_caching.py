r"""Prefix caching (RadixAttention): entries of earlier requests stay, and a request computes what is new in it only.

Source: `sglang` (arXiv 2312.07104), Section 3, Theorem 3.1 and the algorithm of cache-aware scheduling in its appendix; official code
sgl-project/sglang@006b0e3d317f1cd4a7300e919a4eaa878b1947e7, python/sglang/srt/mem_cache/radix_cache.py (`cache_unfinished_req`,
`cache_finished_req`), @00550cd11b35def9d584bf761a1e32729c20a21d python/sglang/srt/managers/schedule_policy.py
(`_sort_by_longest_prefix`). `radix_tree` keeps what is there.

Differs from the paper: as in the code, a prompt is in the tree as soon as it is read, so that requests that run share it, and who doesn't fit
in ends the search for others. A request that has to give up its memory leaves what was computed in the tree, where it is evicted in
its turn; the code frees it at once. The last token of a text is always computed, since the next one is chosen from it.

Not here: a guess of how long answers will be, by which the code admits fewer; holding back a request whose beginning another one is
about to compute; programs that say what they share; a cache that outlives one call of `serve`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from refimpl.inference.system_level.design.paged_attention import attend_by_tables, check_attention
from refimpl.inference.system_level.optimization.radix_tree import Node, RadixTree
from refimpl.inference.system_level.pool import Pool
from refimpl.inference.system_level.protocol import Request, Served, Serving, Watch, check_requests
from refimpl.inference.system_level.scheduling import Job, iterate
from refimpl.inference.system_level.selective_batching import Attend, Pass
from refimpl.model.model import Decoder

Schedule = Literal["longest-prefix", "arrival"]


@dataclass(frozen=True, kw_only=True)
class PrefixCaching(Serving):
    """Iteration-level scheduling over a memory that forgets as late as it can.

    Args:
        slots: requests in an iteration at most.
        memory: entries, those of ended requests included; they are given up where others need the room.
        schedule: who joins first of those that wait: whose prompt begins with the longest text that is there, or who came first.

    Examples:
        >>> import torch
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> turns = [Request(prompt=(5, 7, 33, 2), n=1), Request(prompt=(5, 7, 33, 9, 9), n=2, arrival=1)]
        >>> PrefixCaching().serve(model, turns).prefill_tokens  # four, and the last two of the second
        6
    """

    slots: int = 8
    memory: int = 4096
    schedule: Schedule = "longest-prefix"

    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests; see `protocol.Serving.serve`.

        Raises:
            ValueError: also if the model's attention function has been replaced.
        """
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(get_args(Schedule))}")
        check_requests(model, requests, self.slots, self.memory)
        check_attention(model)
        store = Remembering(model, self.memory, self.schedule)
        served = iterate(model, requests, self.slots, store, watch)
        store.forget()
        return served


@dataclass
class Holding:
    """What a request that runs holds.

    Attributes:
        places: of all its tokens, of that to come included.
        node: the tree's, up to which they are its own.
    """

    places: list[int]
    node: Node


class Remembering:
    """A store of single entries, of which the tree owns all that was computed and may be needed again (see `scheduling.Store`).

    Args:
        model: gives layers, dtype and device.
        memory: entries.
        schedule: see `PrefixCaching`.
    """

    def __init__(self, model: Decoder, memory: int, schedule: Schedule) -> None:
        self.pool, self.tree = Pool(model.config, memory, 1, model.embedding.weight), RadixTree()
        self._schedule, self._free = schedule, list(range(memory))[::-1]
        self._holding: dict[Job, Holding] = {}
        self._joined: list[Job] = []

    @property
    def held(self) -> int:
        """Bytes of all entries that are not free, those that may be evicted included."""
        return (self.pool.keys.shape[1] - len(self._free)) * self.pool.block_bytes

    @property
    def used(self) -> int:
        """Bytes of the entries of those that run; what several share counts once."""
        return len({place for holding in self._holding.values() for place in holding.places}) * self.pool.block_bytes

    @property
    def resident(self) -> int:
        """The whole memory, which is allocated at the start."""
        return self.pool.nbytes

    def order(self, waiting: list[Job]) -> list[Job]:
        """The longest match first; equal ones as they came."""
        if self._schedule == "arrival":
            return waiting
        return sorted(waiting, key=lambda job: -len(self.tree.match(job.text[:-1])[0]))

    def admit(self, job: Job) -> bool:
        """Take what is there, and room for the rest."""
        places, node = self.tree.match(job.text[:-1])
        self.tree.lock(node)
        new = self._take(len(job.text) - len(places))
        if new is None:
            self.tree.unlock(node)
            return False
        self._holding[job], job.read = Holding(places + new, node), len(places)
        self._joined.append(job)
        return True

    def grow(self, job: Job) -> bool:
        """Another entry."""
        new = self._take(1)
        if new is None:
            return False
        self._holding[job].places += new
        return True

    def attend_to(self, whole: Pass, running: list[Job]) -> Attend:
        """Each by its places, which are blocks of one token."""
        return attend_by_tables(whole, self.pool, [self._holding[job].places for job in running])

    def after(self, running: list[Job]) -> None:  # noqa: ARG002 - the protocol's
        """What was read for the first time is in the tree from now on."""
        for job in self._joined:
            self._share(job)
        self._joined = []

    def release(self, job: Job) -> None:
        """Leave all that was computed to the tree."""
        self._share(job)
        holding = self._holding.pop(job)
        self.tree.unlock(holding.node)
        self._free += holding.places[job.read :]  # an entry for a token that was not read yet

    def forget(self) -> None:
        """Empty the tree, of which nobody uses anything any more."""
        self._free += self.tree.evict(self.tree.size)

    def _share(self, job: Job) -> None:
        """Put a request's text into the tree; where it is there already, use that and free one's own."""
        holding, read = self._holding[job], job.read
        self.tree.insert(job.text[:read], holding.places[:read])
        places, node = self.tree.match(job.text[:read])
        self._free += [mine for mine, theirs in zip(holding.places, places, strict=False) if mine != theirs]
        holding.places[:read] = places
        self.tree.lock(node)
        self.tree.unlock(holding.node)
        holding.node = node

    def _take(self, entries: int) -> list[int] | None:
        """Free entries, some of them evicted from the tree if need be; None if there are not as many."""
        if entries > len(self._free) + self.tree.size - self.tree.locked:
            return None
        if entries > len(self._free):
            self._free += self.tree.evict(entries - len(self._free))
        return [self._free.pop() for _ in range(entries)]
