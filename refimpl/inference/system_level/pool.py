r"""A memory for keys and values, divided into blocks that any sequence may own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refimpl.model.config import Config


class Pool:
    """Keys and values of all layers; an entry stands at place `block * size + offset` in each.

    Args:
        config: of the decoder.
        count: blocks.
        size: tokens of a block.
        like: a tensor of the dtype and on the device that are wanted.

    Attributes:
        keys: `[layers, count, size, kv_heads, head_dim]`; zeros, since an entry that nobody attends to has weight 0, and 0 times what
            stands there must be 0.
        values: of the same shape.

    Examples:
        >>> config = Config(vocabulary=2, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=4)
        >>> pool = Pool(config, count=3, size=2, like=torch.zeros(1))
        >>> pool.write(0, torch.tensor([5, 2]), torch.ones(2, 1, 4), torch.ones(2, 1, 4))
        >>> pool.keys[0, :, :, 0, 0].tolist(), pool.block_bytes
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 64)
    """

    def __init__(self, config: Config, count: int, size: int, like: Tensor) -> None:
        shape = (config.n_layers, count, size, config.n_kv_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return self.nbytes // self.keys.shape[1]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values `[tokens, kv_heads, head_dim]` at places `[tokens]`."""
        self.keys[layer].flatten(0, 1)[places] = k
        self.values[layer].flatten(0, 1)[places] = v

    def copy(self, source: int, target: int) -> None:
        """Copy a block, in all layers."""
        for x in (self.keys, self.values):
            x[:, target] = x[:, source]

    def gather(self, layer: int, tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` entries of tables `[rows, blocks]`, side by side: `[rows, kv_heads, length, head_dim]`."""
        k, v = (x[layer][tables].flatten(1, 2)[:, :length].transpose(1, 2) for x in (self.keys, self.values))
        return k, v

    def places(self, table: Sequence[int]) -> Tensor:
        """Where the tokens of a sequence stand, `[blocks * size]`."""
        size = self.keys.shape[2]
        blocks = torch.tensor(table, dtype=torch.int64, device=self.keys.device)
        return (blocks[:, None] * size + torch.arange(size, device=self.keys.device)).flatten()


class Placed:
    """One sequence's part of a pool, as a `refimpl.model.cache.Cache` for one pass: room for its new tokens is there.

    Args:
        pool: where it lies.
        table: its blocks.
        start: tokens that are there already.
    """

    def __init__(self, pool: Pool, table: Sequence[int], start: int) -> None:
        self.pool, self.length = pool, start
        self._table, self._places = torch.tensor([table], device=pool.keys.device), pool.places(table)

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self._table.shape[1] * self.pool.block_bytes

    def update(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002 - the protocol's, as the next
        positions: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, None]:
        """Write the new entries, and return all; see `Cache.update`."""
        end = self.length + k.shape[2]
        self.pool.write(layer, self._places[self.length : end], k[0].transpose(0, 1), v[0].transpose(0, 1))
        if self.length == 0:
            return k, v, None
        return *self.pool.gather(layer, self._table, end), None

    def compress_prefill(self) -> None:
        """Nothing: all is kept."""

    def reset(self) -> None:
        """Nothing: the blocks are given back by their owner."""
