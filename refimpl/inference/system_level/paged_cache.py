r"""Rows that share blocks: samples of one prompt, and beams.

Source: `paged-attention` (arXiv 2309.06180), Section 4.4 and Figures 8 and 9.

Differs from the paper: none.

Not here: attention block by block (`design/paged_attention` has it, for one token of each row); what the rows attend to is gathered.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refimpl.inference.system_level.blocks import Blocks
from refimpl.inference.system_level.pool import Pool
from refimpl.model.config import Config


class PagedCache:
    """A `refimpl.model.cache.Cache` whose rows can be chosen, repeated and put into another order without copying a token.

    Args:
        config: of the decoder.
        memory: entries of all rows together, rounded down to whole blocks.
        block_size: tokens of a block.
        like: a tensor of the dtype and on the device that are wanted, as a parameter of the decoder is.

    Attributes:
        blocks: who owns what.
        pool: what lies there.

    Examples:
        Four samples of one prompt: it is read once, up to its last token.

        >>> from refimpl.model.generate import generate
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> prompt, cache = torch.randint(61, (1, 33)), PagedCache(config, 256, like=model.norm.weight)
        >>> with torch.no_grad():
        ...     hidden = model.hidden(prompt[:, :-1], cache)
        >>> cache.select(torch.zeros(4, dtype=torch.int64))
        >>> drawn = torch.Generator().manual_seed(1)
        >>> generate(model, prompt[:, -1:].expand(4, 1), 5, temperature=1.0, generator=drawn, cache=cache).shape
        torch.Size([4, 5])
        >>> cache.blocks.taken  # two of the prompt, which all share, and one each for what is their own
        6
    """

    def __init__(self, config: Config, memory: int, block_size: int = 16, *, like: Tensor) -> None:
        if not 1 <= block_size <= memory:
            raise ValueError(f"block_size={block_size} must be at least 1, and memory={memory} hold a block")
        self.blocks = Blocks(memory // block_size, block_size)
        self.pool = Pool(config, memory // block_size, block_size, like)
        self.reset()

    def reset(self) -> None:
        """Give up all rows."""
        for sequence in list(self.blocks.tables):
            self.blocks.close(sequence)
        self._rows: list[int] = []
        self._seen: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max(self._seen.values(), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that are taken, of a memory that lies there whole from the start (`pool.nbytes`)."""
        return self.blocks.taken * self.pool.block_bytes

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Go on with these of the rows held, `[new batch]`: blocks are shared, and none is copied yet."""
        old = self._rows
        self._rows = [self.blocks.fork(old[int(row)]) for row in rows]
        for sequence in old:
            self.blocks.close(sequence)

    def update(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002 - the protocol's, as the next
        positions: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, None]:
        """Append to each row, and return all of it; see `Cache.update`.

        Raises:
            ValueError: the batch is not that of the tokens before, or no block is free.
        """
        batch, _, time, _ = k.shape
        if not self._rows:
            self._rows = [self.blocks.open() for _ in range(batch)]
        if len(self._rows) != batch:
            raise ValueError(f"the cache holds a batch of {len(self._rows)}, and gets {batch}: reset() it first")
        start = self._seen.get(layer, 0)
        end = start + time
        try:
            for row in self._rows:
                if self.blocks.tables[row].length < end:  # the first layer makes room for all
                    copy = self.blocks.append(row, end - self.blocks.tables[row].length)
                    if copy:
                        self.pool.copy(*copy)
        except ValueError:  # no block is free: rows before this one give back theirs
            for row in self._rows:
                self.blocks.shorten(row, start)
            raise
        self._seen[layer] = end
        tables = [self.blocks.tables[row].blocks for row in self._rows]
        places = torch.cat([self.pool.places(table)[start:end] for table in tables])
        self.pool.write(layer, places, *(x.transpose(1, 2).flatten(0, 1) for x in (k, v)))
        return *self.pool.gather(layer, torch.tensor(tables, device=k.device), end), None

    def compress_prefill(self) -> None:
        """Nothing: all is kept."""
