r"""InfLLM: the first tokens, the most recent ones, and of all between them the blocks that fit, at one distance.

Source: `infllm` (arXiv 2402.04617), Section 3; official code thunlp/InfLLM@12b70798f56e56ebb23c53c7018091a3f540a028,
inf_llm/attention/context_manager.py, with the sizes of config/mistral-inf-llm.yaml. Queries are taken `chunk` at a time. Each sees the
`local` tokens up to itself where they stand; before them, all at distance `local`, the first tokens, the blocks chosen for its chunk,
and those that have left its window and do not fill a block yet. What leaves the window fills the first tokens, and then blocks.
A block is known by the mean of its `representatives` keys, of each query head those that have received the most attention
while they were in the window; a chunk's worth of a block is the sum of its queries' products with that, over all heads.

Differs from the paper: what a key has received is the sum of softmax weights, as in the code, where the paper has the mean of
products. Every token is seen once: the code shows a chunk's earlier queries those tokens twice that leave the window within the
chunk. The distance is the paper's $l_L$; the code's is $l_L - 1$. Section 4.2 reads 96 blocks with Mistral and 32 with Llama-3, where the
file has 16. The sizes are cut to small budgets, see `sizes`.

How bytes are counted: `nbytes` is all that is held, wherever; `host_bytes` is what of it lies in the host's memory, the blocks, and
what the device holds is the rest. Nothing is freed, it moves; on a machine without an accelerator it moves within one memory.
`loaded_bytes` is what came back so far.

How it fits the family's protocol: a distant key would have to stand at another place for each query. So attention is computed
here, and what `update` returns for a query is what it has found, as one value for each query head that it alone attends to. For
calls of many tokens that takes a mask of time by time: read long prompts in chunks (`prefill_chunk`).

Not here: blocks of each query head's own (the code's `perhead`), look-up for several chunks at once (`chunk_topk_calc`), an index on
the CPU (faiss), `Decoder.score_bias`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import NOBODY, LayeredCache
from refimpl.inference.kv_cache.retrieved.block_memory import BlockMemory
from refimpl.inference.kv_cache.retrieved.moving_window import MovingWindow
from refimpl.inference.kv_cache.retrieved.near_and_far import near_and_far
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.config import Config
from refimpl.model.rope import Rotation, inverse_frequencies, rotate


class Sizes(NamedTuple):
    """Tokens, but for `blocks`: the first, those of a block, blocks that are read, those of the window and of a chunk."""

    initial: int
    block: int
    blocks: int
    local: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class InfLLM:
    """A cache whose past lies in blocks outside the device.

    Args:
        budget: tokens that a query sees: the first, blocks, and the window, which is what the others leave; the default
            makes it the official 4,096.
        initial: first tokens.
        block_size: tokens of a block.
        blocks: that are read for a chunk; 0 looks nothing up.
        representatives: keys of a block whose mean stands for it.
        chunk: queries that share a look-up.

    Examples:
        >>> InfLLM().sizes
        Sizes(initial=128, block=128, blocks=16, local=4096, chunk=512)
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, x = InfLLM(budget=16, initial=1, block_size=2, blocks=1).cache(config), torch.randn(1, 2, 40, 4)
        >>> found = cache.update(0, x[:, :1], x[:, :1], x, torch.arange(40)[None])[1]
        >>> found.shape, cache.host_bytes / (2 * 2 * 4 * 4)  # 13 in the window, 1 the first, 26 in blocks
        (torch.Size([1, 2, 40, 4]), 13.0)
    """

    budget: int = 6272
    initial: int = 128
    block_size: int = 128
    blocks: int = 16
    representatives: int = 4
    chunk: int = 512

    def __post_init__(self) -> None:
        least = {"budget": 1, "initial": 0, "block_size": 1, "blocks": 0, "representatives": 1, "chunk": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {value}; the official {getattr(InfLLM, name)}"
                )

    @property
    def sizes(self) -> Sizes:
        """What is made of the budget.

        The window has its official share at least, 32 of 49 tokens; the first tokens and the blocks share the rest as they ask for it.
        A block has an eighth of the budget at most, a chunk lies within the window.
        """
        initial, inside, left = self.initial, self.blocks * self.block_size, self.budget * 17 // 49
        if (asked := initial + inside) > left:
            initial, inside = math.ceil(initial * left / asked), inside * left // asked
        block = max(1, min(self.block_size, self.budget // 8))
        blocks = inside // block
        local = self.budget - initial - blocks * block
        return Sizes(initial, block, blocks, local, min(self.chunk, local))

    def cache(self, config: Config) -> "InfLLMCache":
        """An empty cache.

        Raises:
            ValueError: keys can't be moved, because the frequencies of their rotation depend on the length (dynamic NTK).
        """
        if config.rope.type == "dynamic":
            raise ValueError(
                "rope type='dynamic' turns keys by the length of the text: they can't be moved in it; use 'yarn'"
            )
        rotation = Rotation(inverse_frequencies(config.rope, config.head_dim, config.max_positions))
        return InfLLMCache(lambda layer: _Layer(self, rotation, config.sliding_window[layer]))


class InfLLMCache(LayeredCache):
    """A `LayeredCache` that knows what lies where."""

    @property
    def host_bytes(self) -> int:
        """Bytes of blocks, which lie in the host's memory."""
        return sum(memory.host_bytes for memory in self._memories())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of blocks that were copied to the device so far."""
        return sum(memory.loaded_bytes for memory in self._memories())

    def _memories(self) -> list[BlockMemory]:
        return [layer.memory for layers in self._layers.values() for layer in cast("Iterable[_Layer]", layers)]


class _Layer:
    """The first tokens, blocks with what stands for them, and the tokens since, of which the last `local` are the window.

    Tokens since the last block are rotated as they came, those before are turned back to position 0.
    """

    def __init__(self, method: InfLLM, rotation: Rotation, window: int | None) -> None:
        self.sizes, self.representatives = method.sizes, method.representatives
        self.rotation, self.window = rotation, window
        self.keys, self.values, self.received = MovingWindow(), MovingWindow(), MovingWindow()
        self.first_keys, self.first_values = Tokens(), Tokens()
        self.memory, self.stand_ins = BlockMemory(max(1, 2 * self.sizes.blocks)), Tokens()

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What each query finds, for it alone."""
        time, found = queries.shape[2], []
        for first in range(0, time, self.sizes.chunk):
            part = slice(first, first + self.sizes.chunk)
            found.append(self._attend(queries[:, :, part], k[:, :, part], v[:, :, part], start + first))
            self._leave(start + min(time, part.stop))
        value = torch.cat(found, dim=2)
        if time == 1:
            return value, value, None
        places = torch.full((1, 1, time, time), NOBODY, device=k.device)
        places[0, 0].diagonal().copy_(torch.arange(start, start + time))
        return value, value, places

    def compress_prefill(self) -> None:
        """Nothing: what has left the window is in blocks already."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """What a chunk's queries `[rows, heads, time, d]` find; the attention that keys in the window get is noted."""
        end, wide = start + q.shape[2], torch.promote_types(q.dtype, torch.float32)
        self.keys.append(k)
        self.values.append(v)
        self.received.append(q.new_zeros(q.shape[:3], dtype=wide))
        near, local = self.keys.length, self.sizes.local
        distant = rotate(self._turned_back(q, start), *self.rotation(torch.tensor([[local]], device=q.device), wide))
        far_k, far_v, far_at = self._far(distant, end)
        now = torch.arange(start, end, device=q.device).unsqueeze(1)
        behind = now - torch.arange(end - near, end, device=q.device)  # [time, near]
        beyond = now - far_at[:, None, None, None]  # [rows, 1, 1, time, far]
        seen, distantly = (behind >= 0) & (behind < local), beyond >= local
        if self.window is not None:
            seen, distantly = seen & (behind < self.window), distantly & (beyond < self.window)
        keys, values = (self.keys.all().to(wide), far_k), (self.values.all().to(wide), far_v)
        found, received = near_and_far((q.to(wide), distant), keys, values, (seen, distantly))
        self.received.all().add_(received)
        return found.to(q.dtype)

    def _far(self, distant: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[rows, kv_heads, far, d]` that may stand at one distance, at position 0, and where they stand in the text, `[rows, far]`."""
        rows, size = len(distant), self.sizes.block
        leaving, held = max(0, self.keys.length - self.sizes.local), self.keys.length
        keys, values = self._turned_back(self.keys.all()[:, :, :leaving], end - held), self.values.all()[:, :, :leaving]
        at = torch.arange(end - held, end - held + leaving, device=keys.device).expand(rows, -1)
        if self.first_keys.length:
            keys, values = (
                torch.cat((self.first_keys.all(), keys), dim=2),
                torch.cat((self.first_values.all(), values), dim=2),
            )
            at = torch.cat((torch.arange(self.first_keys.length, device=at.device).expand(rows, -1), at), dim=1)
        if min(self.memory.count, self.sizes.blocks):
            index = self._chosen(distant)
            found = self.memory.load(index).view(rows, index.shape[1], 2, keys.shape[1], size, -1)
            k, v = (x.transpose(1, 2).flatten(2, 3) for x in found.unbind(dim=2))
            inside = self.sizes.initial + index.unsqueeze(2) * size + torch.arange(size, device=at.device)
            keys, values = torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2)
            at = torch.cat((inside.flatten(1), at), dim=1)
        return keys.to(distant.dtype), values.to(distant.dtype), at

    def _chosen(self, distant: Tensor) -> Tensor:
        """Blocks that a chunk reads, in order, `[rows, n]`."""
        if self.memory.count <= self.sizes.blocks:
            return torch.arange(self.memory.count, device=distant.device).expand(len(distant), -1)
        worth = (self.stand_ins.all().to(distant.dtype) @ distant.mean(dim=2).unsqueeze(3)).sum(dim=(1, 3))
        return worth.topk(self.sizes.blocks, dim=1).indices.sort(dim=1).values

    def _leave(self, end: int) -> None:
        """Tokens that have left the window of the next query become the first ones, and then blocks, if there are enough of them."""
        size = self.sizes.block
        first = min(self.sizes.initial - self.first_keys.length, self.keys.length - self.sizes.local)
        if first > 0:
            k, v, _ = self._taken(first, end)
            self.first_keys.append(k)
            self.first_values.append(v)
        blocks = (self.keys.length - self.sizes.local) // size
        if blocks > 0:
            k, v, received = (torch.unflatten(x, 2, (blocks, size)) for x in self._taken(blocks * size, end))
            best = received.topk(min(self.representatives, size), dim=3).indices
            own = k.repeat_interleave(received.shape[1] // k.shape[1], dim=1)  # [rows, heads, blocks, size, d]
            best = best.unsqueeze(4).expand(*best.shape, k.shape[4])
            self.stand_ins.append(own.gather(3, best).to(received.dtype).mean(dim=3).to(k.dtype))
            self.memory.append(torch.stack((k, v), dim=1).permute(0, 3, 1, 2, 4, 5).flatten(2))

    def _taken(self, count: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first of the recent tokens, which are dropped: keys turned back, values, and what they have received."""
        k = self._turned_back(self.keys.all()[:, :, :count], end - self.keys.length).to(self.keys.all().dtype)
        taken = k, self.values.all()[:, :, :count], self.received.all()[:, :, :count]
        for window in (self.keys, self.values, self.received):
            window.drop(count)
        return taken

    def _turned_back(self, x: Tensor, start: int) -> Tensor:
        """`[rows, heads, time, d]` that stand at positions from `start` on, as they would at 0, in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.rotation(torch.arange(start, start + x.shape[2], device=x.device)[None], wide)
        return rotate(x.to(wide), cos, -sin)
