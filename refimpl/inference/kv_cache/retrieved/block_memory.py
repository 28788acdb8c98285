r"""Blocks that lie in the host's memory, of which those used last stay on the device.

Source: `infllm` (arXiv 2402.04617), Section 3.2, Cache Management, and Appendix C.1; official code
thunlp/InfLLM@12b70798f56e56ebb23c53c7018091a3f540a028, inf_llm/attention/context_manager.py (`MemoryUnit`, `CudaCache`,
`remove_lru_blocks`): least recently used goes first, and a block of the present call never.

Differs from the paper: none. On a machine whose device is the host, blocks are copied all the same, from memory to memory.

Not here: pinned memory, and a stream of its own for the copies; frequency scores instead of recency, the code's other strategy.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from refimpl.inference.kv_cache.tokens import Tokens


class BlockMemory:
    """Blocks of `width` numbers for each of some units, such as the rows of a batch; all units have as many.

    Args:
        slots: blocks of a unit that the device keeps, 1 or more.

    Attributes:
        loaded_bytes: copied from host to device so far.

    Examples:
        >>> memory = BlockMemory(slots=2)
        >>> memory.append(torch.arange(8.0).view(1, 4, 2))
        >>> memory.load(torch.tensor([[1, 3]])).tolist(), memory.loaded_bytes
        ([[[2.0, 3.0], [6.0, 7.0]]], 16)
        >>> memory.load(torch.tensor([[0, 3]])).tolist(), memory.loaded_bytes  # block 3 is still there
        ([[[0.0, 1.0], [6.0, 7.0]]], 24)
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.loaded_bytes = slots, 0
        self._host = Tokens()
        self._device: Tensor | None = None  # [units, slots, width]
        self._places: list[OrderedDict[int, int]] = []  # of each unit, block to slot, the least recently used first

    @property
    def count(self) -> int:
        """Blocks of each unit."""
        return self._host.length

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in the host's memory, room included."""
        return self._host.nbytes

    def append(self, blocks: Tensor) -> None:
        """Move blocks `[units, blocks, width]` to the host; the first call sets units, width, dtype and device."""
        if self._device is None:
            self._device = blocks.new_empty(len(blocks), self.slots, blocks.shape[2])
            self._places = [OrderedDict() for _ in blocks]
        self._host.append(blocks.to("cpu").unsqueeze(1))

    def load(self, index: Tensor) -> Tensor:
        """Blocks on the device.

        Args:
            index: `[units, n]`, n different blocks of each unit, at most `slots`.

        Returns:
            `[units, n, width]`, a copy.

        Raises:
            ValueError: more blocks than the device has slots for, or nothing was appended yet.
        """
        if self._device is None or index.shape[1] > self.slots:
            raise ValueError(f"{index.shape[1]} blocks of {self.count} can't be loaded into {self.slots} slots")
        slots = torch.tensor([self._placed(unit, wanted) for unit, wanted in enumerate(index.tolist())])
        slots = slots.to(self._device.device).unsqueeze(2).expand(-1, -1, self._device.shape[2])
        return self._device.gather(1, slots)

    def _placed(self, unit: int, wanted: list[int]) -> list[int]:
        """Slots of a unit's blocks, after those that are missing were copied there."""
        places = self._places[unit]
        missing = [block for block in wanted if block not in places]
        for block in wanted:
            if block in places:
                places.move_to_end(block)
        for block in missing:
            places[block] = len(places) if len(places) < self.slots else places.popitem(last=False)[1]
        for block in wanted:
            places.move_to_end(block)
        if missing and self._device is not None:
            brought = self._host.all()[unit, 0, missing]
            self._device[unit, [places[block] for block in missing]] = brought.to(self._device.device)
            self.loaded_bytes += brought.nbytes
        return [places[block] for block in wanted]
