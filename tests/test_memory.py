"""Peak memory: what a block takes at most, not what it leaves."""

import ctypes

import pytest
import torch

from refimpl.memory import peak_of

MIB = 2**20


def test_what_is_freed_again_counts_and_what_was_there_does_not(device):
    """Oracle: arithmetic: 96 MiB were held before, the block takes 128 and frees them, and leaves 16."""
    held = torch.ones(24 * MIB, device=device)
    with peak_of(device) as peak:
        large = torch.ones(32 * MIB, device=device)
        del large
        left = torch.ones(4 * MIB, device=device)
    assert 0.9 * 128 * MIB < peak.bytes < 160 * MIB
    assert len(held) + len(left) == 28 * MIB


def test_nothing_takes_little(device):
    """Negative control, after a block that took much."""
    with peak_of(device):
        torch.ones(32 * MIB, device=device)
    with peak_of(device) as peak:
        pass
    assert peak.bytes < 16 * MIB


def test_an_error_passes(device):
    with pytest.raises(ValueError, match="a method's own"), peak_of(device):
        raise ValueError("a method's own")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives back what was freed")
def test_memory_used_again_counts():
    """Oracle: arithmetic: 16 MiB in blocks that fit into what was freed just before, behind blocks that are still held."""
    before = [torch.ones(MIB // 4) for _ in range(64)]
    held = before[::8]
    del before
    with peak_of(torch.device("cpu")) as peak:
        again = [torch.ones(MIB // 4) for _ in range(16)]
    assert 0.9 * 16 * MIB < peak.bytes < 24 * MIB
    assert len(held) + len(again) == 24
