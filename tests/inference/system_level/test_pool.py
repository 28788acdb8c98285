"""A pool of blocks, and one sequence's part of it. Oracle: a contiguous cache, and bytes by hand."""

import pytest
import torch

from refimpl.inference.system_level.pool import Placed, Pool
from refimpl.inference.system_level.protocol import entry_bytes
from refimpl.model.cache import FullCache
from refimpl.model.config import Config

CONFIG = Config(vocabulary=5, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    """Oracle: by hand: a block is as large as its entries."""
    pool = Pool(CONFIG, count=3, size=4, like=torch.zeros(1, dtype=dtype))
    assert pool.block_bytes == 4 * entry_bytes(CONFIG, dtype) == 4 * 2 * 2 * 2 * 4 * dtype.itemsize
    assert pool.keys.nbytes + pool.values.nbytes == 3 * pool.block_bytes
    assert Placed(pool, [2, 0], 0).nbytes == 2 * pool.block_bytes


def test_a_scattered_sequence_is_what_a_contiguous_cache_holds(generator):
    """Oracle: `FullCache`, of a text read in three parts, blocks in no order; what others own is left as it was."""
    pool, whole = Pool(CONFIG, count=5, size=4, like=torch.zeros(1)), FullCache()
    start, table = 0, [3, 0, 4]
    for time in (5, 1, 3):
        for layer in range(2):
            k, v, q = (torch.randn(1, 2, time, 4, generator=generator) for _ in range(3))
            part = Placed(pool, table[: -(-(start + time) // 4)], start)
            mine = part.update(layer, k, v, q, torch.arange(start, start + time)[None])
            theirs = whole.update(layer, k, v, q, torch.arange(start, start + time)[None])
            assert mine[2] is None and all(torch.equal(x, y) for x, y in zip(mine[:2], theirs[:2], strict=True))
        start += time
    assert (
        pool.keys[:, [1, 2]].abs().max() == 0
        and pool.keys[:, 4, 1:].abs().max() == 0
        and pool.keys[:, 4, 0].abs().min() > 0
    )
    assert pool.places(table).tolist() == [12, 13, 14, 15, 0, 1, 2, 3, 16, 17, 18, 19]


def test_a_copy_is_of_all_layers(generator):
    pool = Pool(CONFIG, count=3, size=4, like=torch.zeros(1))
    pool.write(1, torch.tensor([4, 7]), *(torch.randn(2, 2, 4, generator=generator) for _ in range(2)))
    pool.copy(1, 2)
    assert torch.equal(pool.keys[:, 1], pool.keys[:, 2]) and torch.equal(pool.values[:, 1], pool.values[:, 2])
    assert pool.values[1, 2].abs().max() > 0 and pool.keys[:, 0].abs().max() == 0
