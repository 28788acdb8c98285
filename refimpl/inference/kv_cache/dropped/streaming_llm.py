r"""StreamingLLM: the first tokens and the most recent ones, at positions counted inside the cache.

Source: `streaming-llm` (arXiv 2309.17453), Section 3.2 and Figure 4; official code
mit-han-lab/streaming-llm@2e5042606d69933d88fbf909bd77907456b9b4dd, streaming_llm/kv_cache.py, pos_shift/modify_llama.py and
examples/eval_long_ppl.py: new tokens see all that is held and themselves, and then the cache is cut to its budget (the chat of
examples/run_streaming_llama.py drops as much before a prompt as it and the longest reply will take).

Differs from the paper: it caches keys before they are rotated and rotates all of them at each step. Attention depends on
distances only, and of these the position inside the cache changes those to the sinks alone. So the window stays as it was
rotated, and the sinks are turned to where they stand just before it: the same attention, to rounding, for a few rotations a step.
So that positions stay small however long the text (the angle of position 4,000,000 is off by up to a quarter of a radian in
float32), they are counted anew whenever they could be by a whole budget, and the window is turned back then.

Not here: a sink token that the model was trained with (pass `sinks=1` for such a model); Falcon's and MPT's positions. A
sliding-window layer sees what of the cache lies in its window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.protocol import Turn
from refimpl.model.config import Config


@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """A cache of constant size.

    Args:
        budget: tokens kept between calls, above `sinks`; the official chat keeps 4 + 2,000.
        sinks: first tokens that are never dropped; 0 is plain window attention.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> cache, v = StreamingLLM(budget=4, sinks=1).cache(config), torch.arange(10.0).view(1, 1, 10, 1).expand(1, 1, 10, 4)
        >>> whole = cache.update(0, v[:, :, :9], v[:, :, :9], v[:, :, :9], torch.arange(9)[None])[1]
        >>> cache.update(0, v[:, :, 9:], v[:, :, 9:], v[:, :, 9:], torch.tensor([[9]]))[1][0, 0, :, 0].tolist()
        [0.0, 6.0, 7.0, 8.0, 9.0]
    """

    budget: int = 2004
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0; the paper keeps 4")
        if self.budget <= self.sinks:
            raise ValueError(f"budget={self.budget} must be above sinks={self.sinks}: it counts them and the window")

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache.

        Raises:
            ValueError: keys can't be moved, because the frequencies of their rotation depend on the length (dynamic NTK).
        """
        turn = Turn(config)
        return LayeredCache(lambda _: _Layer(self, turn), self._origin)

    def _origin(self, length: int) -> int:
        """What positions are counted off by: whole budgets, so that they stay below two."""
        return max(0, length - self.budget) // self.budget * self.budget


class _Layer:
    """Buffers `[rows, kv_heads, room, head_dim]` of which start:end is held, sinks first, and the sinks as they came."""

    def __init__(self, method: StreamingLLM, turn: Turn) -> None:
        self.budget, self.sinks, self.turn = method.budget, method.sinks, turn
        self.room = self.budget + max(1, self.budget // 32)  # the window moves on at every 32nd of it
        self.start = self.end = self.seen = self.origin = 0
        self.held: list[Tensor] = []  # keys, values
        self.first: list[Tensor] = []  # the same of the sinks, keys at their positions in the text

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, None]:  # noqa: ARG002 - the protocol's
        """All that is held and the new tokens, at positions without gap; then the cache is cut to its budget."""
        self._keep_first(k, v)
        self._place(self.seen - start)
        time = k.shape[2]
        if not self.held or self.end + time > self.held[0].shape[2]:
            every = self._moved([k, v])
        else:
            for buffer, new in zip(self.held, (k, v), strict=True):
                buffer[:, :, self.end : self.end + time] = new
            self.end += time
            every = [buffer[:, :, self.start : self.end] for buffer in self.held]
        self.seen += time
        self.start = max(self.start, self.end - self.budget)
        return every[0], every[1], None

    def compress_prefill(self) -> None:
        """Nothing: `update` has cut the prompt already."""

    def _keep_first(self, k: Tensor, v: Tensor) -> None:
        """The sinks, as they arrive."""
        if self.seen < self.sinks:
            new = [x[:, :, : self.sinks - self.seen] for x in (k, v)]
            old = self.first or [x[:, :, :0] for x in new]
            self.first = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]

    def _place(self, origin: int) -> None:
        """Put the sinks just before the window, and turn the window back if positions are counted from a new origin."""
        dropped = self.seen - self.budget
        if dropped <= 0:
            return
        window = slice(self.start + self.sinks, self.end)
        if origin != self.origin:
            self.held[0][:, :, window] = self.turn(self.held[0][:, :, window], self.origin - origin)
            self.origin = origin
        if self.sinks:
            place = slice(self.start, self.start + self.sinks)
            self.held[0][:, :, place] = self.turn(self.first[0], dropped - origin)
            self.held[1][:, :, place] = self.first[1]

    def _moved(self, new: list[Tensor]) -> list[Tensor]:
        """Held and new tokens together, of which the last `budget` go to new buffers, with room that doubles up to the full."""
        if self.held:
            new = [
                torch.cat((old[:, :, self.start : self.end], x), dim=2) for old, x in zip(self.held, new, strict=True)
            ]
        count, capacity = new[0].shape[2], self.held[0].shape[2] if self.held else 0
        kept = min(count, self.budget)
        size = self.room if kept == self.budget else min(max(kept, 2 * capacity), self.room)
        self.held = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in new]
        for buffer, x in zip(self.held, new, strict=True):
            buffer[:, :, :kept] = x[:, :, count - kept :]
        self.start, self.end = 0, kept
        return new
