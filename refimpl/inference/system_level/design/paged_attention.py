r"""PagedAttention: caches lie in small blocks anywhere in memory, and attention follows each sequence's table of them.

Source: `paged-attention` (arXiv 2309.06180), Eq. (4), Sections 4.1 to 4.5; official code
vllm-project/vllm@00a456f1656e0fa60f0b212ed9b824fe9e688a8b, vllm/core/block_manager_v1.py (blocks), @0054e1fa0f8ac79f0524b6b1f4d7c02f9e37eca1
vllm/core/scheduler.py (preemption). `blocks` keeps the books, `pool` the tensors, `scheduling` the order, `paged_cache` shares blocks
among samples and beams.

Differs from the paper: prompts attend to what was just computed for them, as ordinary attention does (so does the code); if something of a prompt
is in the memory already, it is gathered first. Several blocks are taken in one step, up to `partition` tokens, and steps are joined by
their running maximum and sum, as in the code's second kernel. Layers with a sliding window keep the blocks that have left it.

Not here: swapping to CPU memory (preempted requests are computed again); a watermark of free blocks, which is the code's alone;
fused kernels; one pool over several workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.system_level.blocks import Blocks
from refimpl.inference.system_level.pool import Placed, Pool
from refimpl.inference.system_level.protocol import Request, Served, Serving, Watch, check_requests, entry_bytes
from refimpl.inference.system_level.scheduling import Job, iterate
from refimpl.inference.system_level.selective_batching import Attend, Pass
from refimpl.model.model import Attention, Decoder
from refimpl.model.model import attend as exact


@dataclass(frozen=True, kw_only=True)
class PagedAttention(Serving):
    """Iteration-level scheduling over a memory of blocks, which requests take as they grow.

    Args:
        slots: requests in an iteration at most.
        memory: entries, rounded down to whole blocks.
        block_size: tokens of a block, $B$; the paper's default.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> served = PagedAttention().serve(model, [Request(prompt=(5, 7, 33) * 10, n=300, stop=frozenset(range(61)))])
        >>> served.peak_bytes // entry_bytes(config, torch.float32)  # two blocks, and not 329 entries
        32
    """

    slots: int = 8
    memory: int = 4096
    block_size: int = 16

    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests; see `protocol.Serving.serve`.

        Raises:
            ValueError: also if the model's attention function has been replaced.
        """
        if self.block_size < 1 or 0 < self.memory < self.block_size:
            raise ValueError(f"block_size={self.block_size} must be at least 1, and memory={self.memory} hold a block")
        check_requests(model, requests, self.slots, self.memory // self.block_size * self.block_size)
        check_attention(model)
        return iterate(
            model, requests, self.slots, Paged(model, self.memory // self.block_size, self.block_size), watch
        )


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    bias: Tensor | None = None,
    partition: int = 512,
) -> Tensor:
    r"""Attention of each sequence's last token, $o = \sum_j V_j A_j^\top$ over its blocks j (Eq. 4).

    Args:
        q: `[rows, heads, head_dim]`, rotated.
        keys: `[blocks, size, kv_heads, head_dim]`, a layer of the pool; all finite.
        values: of the same shape.
        tables: `[rows, blocks of the longest]`, int64; behind a row's last block any block may stand.
        lengths: `[rows]`, tokens of each, the query's own included, at least 1.
        window: the last tokens that are seen; None for all.
        bias: `[rows or 1, heads, blocks of the longest * size]`, added to the scores.
        partition: tokens of a row that are gathered at once, rounded to blocks, at least one.

    Returns:
        `[rows, heads, head_dim]` in q's dtype; scores and sums are float32 at least.

    Examples:
        >>> keys = torch.zeros(3, 2, 1, 4)
        >>> values = torch.arange(24.0).view(3, 2, 1, 4)
        >>> tables, lengths = torch.tensor([[2, 0]]), torch.tensor([3])  # tokens at places 4, 5 and 0
        >>> paged_attention(torch.ones(1, 1, 4), keys, values, tables, lengths).tolist()  # their mean
        [[[12.0, 13.0, 14.0, 15.0]]]
    """
    rows, heads, dim = q.shape
    size, kv_heads = keys.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).view(rows, kv_heads, heads // kv_heads, dim) * dim**-0.5
    lowest = torch.finfo(wide).min  # finite: where nothing is seen yet, what was summed up is scaled to 0 later
    top = grouped.new_full((*grouped.shape[:3], 1), lowest)
    total, out = torch.zeros_like(top), torch.zeros_like(grouped)
    step = max(1, partition // size)
    for first in range(0, tables.shape[1], step):
        blocks = tables[:, first : first + step]
        k, v = (x[blocks].flatten(1, 2).to(wide) for x in (keys, values))  # [rows, tokens, kv_heads, dim]
        scores = torch.einsum("rhgd,rthd->rhgt", grouped, k)
        at = first * size + torch.arange(k.shape[1], device=q.device)
        if bias is not None:
            scores = scores + bias[:, :, at].view(len(bias), kv_heads, -1, len(at))
        seen = at < lengths[:, None]
        if window is not None:
            seen &= at >= lengths[:, None] - window
        scores = scores.masked_fill(~seen[:, None, None], lowest)
        higher = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights, scale = (scores - higher).exp(), (top - higher).exp()
        total = total * scale + weights.sum(dim=-1, keepdim=True)
        out = out * scale + torch.einsum("rhgt,rthd->rhgd", weights, v)
        top = higher
    return (out / total).view(rows, heads, dim).to(q.dtype)


def attend_by_tables(whole: Pass, pool: Pool, tables: Sequence[Sequence[int]]) -> Attend:
    """How requests attend whose keys and values lie in a pool: those that read one token all at once, prompts one by one.

    Args:
        whole: the pass.
        pool: where they lie, and where new ones are written.
        tables: blocks of each request, with room for what is new.
    """
    device, size = pool.keys.device, pool.keys.shape[2]
    single = [i for i, part in enumerate(whole.parts) if part.start and part.end - part.first == 1]
    prompts = [
        (part, whole.step(part, Placed(pool, tables[i], part.start)))
        for i, part in enumerate(whole.parts)
        if i not in {*single}
    ]
    where = torch.tensor([whole.parts[i].first for i in single], device=device)
    last = torch.tensor([whole.parts[i].start for i in single], device=device)
    longest = max((len(tables[i]) for i in single), default=0)
    padded = torch.tensor([[*tables[i], *[0] * (longest - len(tables[i]))] for i in single], device=device)
    if single:
        places = padded.gather(1, last[:, None] // size)[:, 0] * size + last % size
    bias = None
    if single and whole.score_bias is not None:
        at = torch.arange(longest * size, device=device)
        bias = whole.score_bias(last[:, None, None, None], at[None, None, None])[:, :, 0]

    def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        if single:
            one_q, one_k, one_v = (x[0, :, where].transpose(0, 1) for x in (q, k, v))  # [rows, heads, head_dim]
            pool.write(attention.layer, places, one_k, one_v)
            keys, values = pool.keys[attention.layer], pool.values[attention.layer]
            found = paged_attention(one_q, keys, values, padded, last + 1, window=attention.window, bias=bias)
            out[0, :, where] = found.transpose(0, 1)
        for part, step in prompts:
            mine = slice(part.first, part.end)
            out[:, :, mine] = attention.mix(q[:, :, mine], k[:, :, mine], v[:, :, mine], step)
        return out

    return attend


def check_attention(model: Decoder) -> None:
    """Check that attention is the exact one, which `paged_attention` takes the place of.

    Raises:
        ValueError: it has been replaced.
    """
    for i, layer in enumerate(model.layers):
        if getattr(layer.attention, "attend", None) is not exact:
            raise ValueError(
                f"layers[{i}].attention.attend is replaced: attention over blocks is exact, and takes its place"
            )


class Paged:
    """A store of blocks (see `scheduling.Store`).

    Args:
        model: gives layers, dtype and device.
        count: blocks.
        size: tokens of a block.
    """

    def __init__(self, model: Decoder, count: int, size: int) -> None:
        self.blocks, self.pool = Blocks(count, size), Pool(model.config, count, size, model.embedding.weight)
        self._entry = entry_bytes(model.config, model.embedding.weight.dtype)
        self._sequences: dict[Job, int] = {}

    @property
    def held(self) -> int:
        """Bytes of the blocks that are taken."""
        return self.blocks.taken * self.pool.block_bytes

    @property
    def used(self) -> int:
        """Bytes of the entries that were written; no two requests share one."""
        return self._entry * sum(table.length for table in self.blocks.tables.values())

    @property
    def resident(self) -> int:
        """The whole memory, which is allocated at the start."""
        return self.pool.nbytes

    def order(self, waiting: list[Job]) -> list[Job]:
        """As they came."""
        return waiting

    def admit(self, job: Job) -> bool:
        """Blocks for what is to be read now, and no more."""
        sequence = self.blocks.open()
        if self.blocks.needed(sequence, len(job.text)) > self.blocks.free:
            self.blocks.close(sequence)
            return False
        self.blocks.append(sequence, len(job.text))
        self._sequences[job] = sequence
        return True

    def grow(self, job: Job) -> bool:
        """Another block, if the last is full."""
        sequence = self._sequences[job]
        if self.blocks.needed(sequence, 1) > self.blocks.free:
            return False
        copy = self.blocks.append(sequence, 1)
        assert copy is None, "no two requests share a block"
        return True

    def release(self, job: Job) -> None:
        """Its blocks are free."""
        self.blocks.close(self._sequences.pop(job))

    def attend_to(self, whole: Pass, running: list[Job]) -> Attend:
        """Each by its table."""
        return attend_by_tables(whole, self.pool, [self.blocks.tables[self._sequences[job]].blocks for job in running])

    def after(self, running: list[Job]) -> None:
        """Nothing."""
