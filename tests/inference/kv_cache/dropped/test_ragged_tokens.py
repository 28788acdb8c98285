"""Ragged entries: what was to stay is there, in order, and nothing else is held."""

import pytest
import torch

from refimpl.inference.kv_cache.dropped.ragged_tokens import RaggedTokens


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_stays_is_there(share, generator):
    """Oracle: one loop over rows, heads and entries; bytes are those of the entries that stay."""
    x, note = torch.randn(2, 3, 9, 4, generator=generator), torch.arange(54).view(2, 3, 9)
    stay, held = torch.rand(2, 3, 9, generator=generator) < share, RaggedTokens()
    held.hold([x, note], stay)
    (padded, notes), there = held.padded()
    for row in range(2):
        for head in range(3):
            mine = [j for j in range(9) if stay[row, head, j]]
            assert held.lengths[row, head] == len(mine) == there[row, head].sum()
            assert torch.equal(padded[row, head, : len(mine)], x[row, head, mine])
            assert notes[row, head].tolist()[: len(mine)] == note[row, head, mine].tolist()
            assert not padded[row, head, len(mine) :].any()
    assert sum(flat.untyped_storage().nbytes() for flat in held.flat) == int(stay.sum()) * (4 * 4 + 8)


def test_nothing_yet():
    (), there = RaggedTokens().padded()
    assert there.shape == (0, 0, 0)
