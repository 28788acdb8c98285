"""Blocks off the device: what comes back, what is copied, which blocks stay, where they lie."""

import pytest
import torch

from refimpl.inference.kv_cache.retrieved.block_memory import BlockMemory


def test_what_comes_back_and_what_is_copied(generator):
    """Oracle: the blocks themselves; a list of those used last, kept in Python."""
    x = torch.randn(3, 20, 6, generator=generator)
    memory, last, copied = BlockMemory(slots=4), [[], [], []], 0
    for part in x.split([7, 1, 12], dim=1):
        memory.append(part)
        for _ in range(20):
            n = int(torch.randint(1, 5, (), generator=generator))
            index = torch.stack([torch.randperm(memory.count, generator=generator)[:n] for _ in range(3)])
            assert torch.equal(memory.load(index), x.gather(1, index.unsqueeze(2).expand(-1, -1, 6)))
            for kept, wanted in zip(last, index.tolist(), strict=True):
                copied += len(set(wanted) - set(kept))
                kept[:] = ([block for block in kept if block not in wanted] + wanted)[-4:]
            assert memory.loaded_bytes == copied * 6 * 4
    assert memory.count == 20
    assert memory.loaded_bytes < 60 * 3 * 4 * 6 * 4  # negative control: some were still there


def test_blocks_lie_in_the_hosts_memory(device):
    """Oracle: the device of each tensor: blocks are the host's, what is loaded is not."""
    memory = BlockMemory(slots=2)
    memory.append(torch.arange(12.0, device=device).view(1, 3, 4))
    assert memory._host.all().device == torch.device("cpu")
    assert memory.host_bytes == 12 * 4
    found = memory.load(torch.tensor([[2, 0]], device=device))
    assert found.device.type == device.type
    assert found.tolist() == [[[8, 9, 10, 11], [0, 1, 2, 3]]]


def test_no_room_for_what_is_asked():
    memory = BlockMemory(slots=1)
    with pytest.raises(ValueError, match="1 blocks of 0 can't be loaded"):
        memory.load(torch.tensor([[0]]))
    memory.append(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="2 blocks of 3 can't be loaded into 1 slots"):
        memory.load(torch.tensor([[0, 1]]))
