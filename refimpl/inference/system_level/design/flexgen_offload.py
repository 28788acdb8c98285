r"""FlexGen's offloading: weights, caches and activations lie on device, in CPU memory and on disk, and a block of requests shares each load.

Source: `flexgen` (arXiv 2303.06865), the sections on the block schedule, the cost model and the policy search; official code
FMInference/FlexGen@19753bc, flexgen/flex_opt.py, experimental/cost_model.py. `offload_cost` says what a plan takes, `offload_speeds` measures the constants for it, `offload_plan` finds the best, `simplex` solves its linear
program, `block_pass` runs it, `tiers` holds the tensors.

Differs from the paper: requests come at their time, and end at their own token; whoever has arrived forms the next block, up to the size
that the plan found best. One plan, for the longest prompt and answer, serves all blocks, since weights are placed once. Memories are given as
shares of what there is to hold, beside the buffers that are computed in. `serve` plans with the official code's constants, so that a plan
repeats on any machine. See the modules for the rest.

Not here: 4-bit weights and caches (`flexgen-kv` is the quantization), sparse attention, attention on the CPU, pipelines of
several devices.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refimpl.inference.system_level.design.block_pass import Offloaded
from refimpl.inference.system_level.design.offload_cost import Hardware, Plan, Task, footprint
from refimpl.inference.system_level.design.offload_plan import search
from refimpl.inference.system_level.design.tiers import Spread
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
from refimpl.inference.system_level.static_batching import reserved
from refimpl.model.generate import pad
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class FlexGenOffload(Serving):
    """Blocks of requests, over weights that come and go.

    Args:
        slots: requests of a block at most.
        memory: entries that a block's caches may have, in all memories together.
        device: share of all weights, caches and activations that the device has room for, beside the buffers that are computed in.
        cpu: the same of CPU memory; what is left goes to disk.
        folder: on the disk that is to be used; None takes the system's for temporary files.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> requests = [Request(prompt=(5, 7), n=3), Request(prompt=(8,), n=2)]
        >>> plan = FlexGenOffload(device=0.25, cpu=0.25).plan(model, requests)
        >>> plan.block, [round(sum(shares), 6) for shares in (plan.weights, plan.cache, plan.activations)]
        (8, [1.0, 1.0, 1.0])
        >>> [len(tokens) for tokens in FlexGenOffload(device=0.25, cpu=0.25).serve(model, requests).tokens]
        [3, 2]
    """

    slots: int = 8
    memory: int = 4096
    device: float = 0.25
    cpu: float = 0.5
    folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("device", "cpu"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share, and must be in [0, 1]")

    def plan(self, model: Decoder, requests: Sequence[Request]) -> Plan:
        """The plan that `serve` follows, for the longest prompt and the longest answer of these."""
        task = task_of(
            model,
            max(len(request.prompt) for request in requests),
            max(request.n for request in requests),
            min(self.memory, self.slots * max(request.entries for request in requests)),
        )
        spread = footprint(task, self.slots, self.slots, streamed=True)[0, [0, 3, 6]].sum()
        hardware = Hardware(device=self.device * spread, cpu=self.cpu * spread, disk=spread)
        return search(task, hardware, self.slots, beside=True)

    @torch.no_grad()
    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests; see `protocol.Serving.serve`.

        Raises:
            OSError: the disk has no room for its share.
            ValueError: also if a layer's parameters are of several dtypes.
        """
        check_requests(model, requests, self.slots, self.memory)
        plan, journal = self.plan(model, requests), Journal(requests, self.slots, weight_bytes(model))
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            offloaded = Offloaded(model, plan, Path(folder))
            while waiting:
                journal.clock = max(journal.clock, requests[waiting[0]].arrival)
                block = self._block(requests, [i for i in waiting if requests[i].arrival <= journal.clock], plan.block)
                waiting = [i for i in waiting if i not in block]
                self._run(offloaded, requests, block, journal, watch)
        return journal.served()

    def _block(self, requests: Sequence[Request], arrived: list[int], most: int) -> list[int]:
        """The first of those who have arrived, as many as there is room for."""
        for size in range(min(most, len(arrived)), 1, -1):
            if size * reserved([requests[i] for i in arrived[:size]]) <= self.memory:
                return arrived[:size]
        return arrived[:1]

    def _run(
        self, offloaded: Offloaded, requests: Sequence[Request], block: list[int], journal: Journal, watch: Watch | None
    ) -> None:
        """Decode a block until its last request has ended."""
        like = offloaded.model.embedding.weight
        tokens, padding = (x.to(like.device) for x in pad([requests[i].prompt for i in block]))
        each, going = entry_bytes(offloaded.model.config, like.dtype), list(block)
        for i in block:
            journal.admit(i, prefill=tokens.shape[1])
        answers = offloaded.run(tokens, padding, max(requests[i].n for i in block))
        for following in answers:
            ran, used = len(going), each * sum(len(requests[i].prompt) + len(journal.answers[i]) for i in going)
            for i, token in zip(block, following.tolist(), strict=True):
                if i in going:
                    journal.token(i, token)
            going = [i for i in going if not requests[i].ends(journal.answers[i])]
            if not going:
                for i in block:
                    journal.end(i)
            held = Held(offloaded.caches)
            device = offloaded.resident + offloaded.nbytes[0]
            journal.iteration(running=ran, held=held.held, used=used, device=device)
            if watch:
                watch(held)
            if not going:
                answers.close()  # gives back what the block held


@dataclass(frozen=True)
class Held:
    """The caches of a block, as `protocol.Watch` is shown them."""

    caches: list[list[Spread]]

    @property
    def held(self) -> int:
        """Bytes in all memories."""
        return sum(sum(cache.nbytes) for batch in self.caches for cache in batch)


def task_of(model: Decoder, prompt: int, new: int, entries: int | None = None) -> Task:
    """Sizes of a decoder, and of a block that is padded to so many tokens.

    Args:
        model: the decoder; its layers' parameters may be on the device `meta`.
        prompt: tokens of a prompt, padding included.
        new: tokens of an answer.
        entries: of a block's caches together.
    """
    config, size = model.config, model.embedding.weight.dtype.itemsize
    parameters = max(sum(p.numel() for p in block.parameters()) for block in model.layers)
    kv, attended = config.n_kv_heads * config.head_dim, config.n_heads * config.head_dim
    around: list[Tensor] = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    return Task(
        layers=config.n_layers,
        weights=parameters * size,
        entry=2 * kv * size,
        feature=config.d_model * size,
        parameters=parameters,
        attended=attended,
        heads=config.n_heads,
        inner=(config.d_model + 2 * attended + 2 * kv + 3 * config.d_ff) * size,
        itemsize=size,
        resident=sum(p.numel() * size for p in around),
        prompt=prompt,
        new=new,
        entries=entries,
    )
