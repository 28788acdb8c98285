"""Marks of the last queries: against a list of all of them."""

import pytest
import torch

from refimpl.inference.kv_cache.dropped.recent_marks import count_marks, mark, ring_bytes


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 10, 16, 17, 400])
def test_against_a_list(window, generator):
    """Oracle: all marks kept, and the last `window` of them summed; queries in chunks of one to sixty."""
    ring, every = torch.zeros(2, 3, 5, ring_bytes(window), dtype=torch.uint8), torch.zeros(2, 3, 0, 5, dtype=torch.bool)
    for time in [1, 1, 6, 1, 13, 1, 1, 1, 60, 2, 8, 30]:
        new = torch.rand(2, 3, time, 5, generator=generator) < 0.5
        late = new[:, :, -window:]
        mark(ring, late, every.shape[2] + time - late.shape[2])
        every = torch.cat([every, new], dim=2)
        last = every.shape[2] - 1
        assert torch.equal(count_marks(ring, last, window), every[:, :, -window:].sum(dim=2))
