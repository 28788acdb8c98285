"""Vectors in groups: against a loop in NumPy, with a short last group; bytes; growth."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.quantized.vectors import PackedVectors
from tests.inference.kv_cache.quantized.rebuilt import plain


@pytest.mark.parametrize("group", [4, 8, 5, 7, None, 20])
@pytest.mark.parametrize("length", [16, 13, 1])
def test_groups_by_loop(group, length, generator):
    """Oracle: the quantizer as a loop over slices in NumPy; the last slice is what is left."""
    x = torch.randn(2, 3, 5, 2, length, generator=generator, dtype=torch.float64) * 3 + 1
    held = PackedVectors(3, group)
    for part in x.split([1, 3, 1], dim=2):
        held.append(part)
    expected, size = torch.empty_like(x), group or length
    for first in range(0, length, size):
        piece = x[..., first : first + size]
        rows = plain(piece.reshape(-1, piece.shape[-1]).numpy().copy(), 3)
        expected[..., first : first + size] = torch.from_numpy(rows).view(piece.shape)
    assert held.length == 5
    assert_close(held.write(torch.empty_like(x)), expected)


def test_writes_into_part_of_a_buffer():
    """Oracle: by hand: 0 to 7 in 3 bits are themselves; what lies around stays."""
    held, buffer = PackedVectors(3, 8), torch.full((1, 1, 5, 8), -1.0)
    held.append(torch.arange(8.0).expand(1, 1, 3, 8))
    held.write(buffer[:, :, 1:4])
    assert buffer[0, 0, 1:4].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 3
    assert set(buffer[0, 0, [0, 4]].flatten().tolist()) == {-1.0}


@pytest.mark.parametrize(
    ("length", "group", "held_bytes"), [(64, 32, 24 + 2 * 4), (64, None, 24 + 4), (20, 8, 9 + 3 * 4)]
)
def test_bytes_by_hand(length, group, held_bytes):
    """Oracle: by hand: 3 bits a number, eights rounded up, and 4 bytes a group, short ones too."""
    held = PackedVectors(3, group)
    held.append(torch.randn(1, 1, 7, length))
    assert sum(t.nbytes for t in (held.codes, held.scale, held.minimum)) == 7 * held_bytes
