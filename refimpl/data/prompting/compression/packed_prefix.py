r"""A prompt's end, packed: the keys and values of its last tokens, from which any number of texts go on.

Source: `gist` (arXiv 2304.08467), Section 3; official code jayelm/gisting@3be0d062b6bdfd3caf51843bbc60261a0855f876,
`src/gist_caching.py` (what is kept), `src/gist_llama.py` (positions count on from the whole prompt).

Differs from the paper: none. Differs from the code: one batch may hold prompts of different lengths.

Not here: beams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.model.cache import FullCache


class Example(NamedTuple):
    """What a model learns from that is to go on from packed prompts: tokens of a prompt, of an input and of its answer."""

    prompt: Sequence[int]
    input: Sequence[int]
    answer: Sequence[int]


class Ends:
    """Keeps the last tokens of a text that is read at once, layer by layer, so that never more than one layer's others are held.

    Args:
        tokens: how many.
    """

    length = 0

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.kept: list[tuple[Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(k.nbytes + v.nbytes for k, v in self.kept)

    def update(
        self,
        layer: int,  # noqa: ARG002 - the protocol's, as the next two
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002
        positions: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, None]:
        """All of these keys and values, the last of which are kept; see `Cache.update`."""
        first = k.shape[2] - self.tokens
        self.kept.append((k[:, :, first:].clone(), v[:, :, first:].clone()))
        return k, v, None

    def compress_prefill(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Forget everything."""
        self.kept.clear()


@dataclass(frozen=True)
class Packed:
    """Keys and values of prompts' ends, read once and used by any number of caches.

    Attributes:
        kept: of each layer, keys and values `[prompts, kv_heads, k, head_dim]`.
        length: tokens read, padding and gist included: where what follows stands.
        padding: `[prompts]`, tokens of left padding, None where there are none; what reads on must be given it.
        windows: the decoder's.
    """

    kept: list[tuple[Tensor, Tensor]]
    length: int
    padding: Tensor | None
    windows: Sequence[int | None]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(k.nbytes + v.nbytes for k, v in self.kept)

    def cache(self, rows: int | None = None) -> "GistCache":
        """A cache that begins with them, which stay as they are.

        Args:
            rows: requests that share the one prompt; None is one for each prompt.

        Raises:
            ValueError: several rows of several prompts.
        """
        prompts = len(self.kept[0][0])
        rows = prompts if rows is None else rows
        if prompts not in (1, rows):
            raise ValueError(f"rows={rows} can't share {prompts} prompts: pack one prompt, or leave rows out")
        return GistCache(self, rows)


class GistCache(FullCache):
    """All keys and values from the gist on; its tokens stand where they would behind the whole prompt.

    Args:
        packed: what it begins with.
        rows: of the batch.
    """

    def __init__(self, packed: Packed, rows: int) -> None:
        super().__init__(packed.windows)
        self.before = packed.length - packed.kept[0][0].shape[2]  # tokens that are not held
        for layer, (k, v) in enumerate(packed.kept):
            k, v = (x.expand(rows, -1, -1, -1) for x in (k, v))
            self.update(layer, k, v, k, torch.arange(k.shape[2])[None])

    @property
    def length(self) -> int:
        """Tokens seen, the prompt's included."""
        return super().length + self.before

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`, the prompt's counted; see `FullCache.truncate`."""
        super().truncate(length - self.before)

    def reset(self) -> None:
        """Forget everything, the gist too."""
        super().reset()
        self.before = 0
