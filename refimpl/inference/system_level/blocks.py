r"""Who owns which block of a memory that is divided into blocks of equal size: tables, reference counts, copy on write.

Token t of a sequence lies in block `table[t // size]` at offset `t % size`. A block may stand in several tables; its count says in how
many. Who writes into a block that others hold, too, gets a copy of his own first.

Source: `paged-attention` (arXiv 2309.06180), Sections 4.2 to 4.4; official code
vllm-project/vllm@00a456f1656e0fa60f0b212ed9b824fe9e688a8b, vllm/core/block_manager_v1.py (`UncachedBlockAllocator`, `append_slots`, `fork`).

Differs from the paper: none.

Not here: swapping blocks to another memory; a watermark of free blocks below which nobody is admitted, which is the code's alone.
"""

from dataclasses import dataclass, field


@dataclass
class Table:
    """A sequence's blocks in order, and the tokens that they hold."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class Blocks:
    """The books of a memory; what lies in it is `pool.Pool`'s.

    Args:
        count: blocks of the memory, 1 or more.
        size: tokens of a block, 1 or more.

    Attributes:
        counts: tables that hold each block.
        tables: of each open sequence.

    Examples:
        >>> blocks = Blocks(count=4, size=16)
        >>> parent = blocks.open()
        >>> blocks.append(parent, 20)  # two blocks, the second is not full
        >>> child = blocks.fork(parent)
        >>> blocks.counts, blocks.free
        ([2, 2, 0, 0], 2)
        >>> blocks.append(child, 1)  # writes into the second: block 1 is to be copied to block 2
        (1, 2)
        >>> blocks.tables[parent].blocks, blocks.tables[child].blocks, blocks.counts
        ([0, 1], [0, 2], [2, 1, 1, 0])
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"count={count} and size={size} must be at least 1: blocks, and tokens of a block")
        self.size, self.counts = size, [0] * count
        self.tables: dict[int, Table] = {}
        self._free, self._next = list(range(count))[::-1], 0

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def taken(self) -> int:
        """Blocks that somebody holds."""
        return len(self.counts) - len(self._free)

    @property
    def unused(self) -> int:
        """Tokens that the last block of each sequence has room for."""
        return sum(len(table.blocks) * self.size - table.length for table in self.tables.values())

    def open(self) -> int:
        """A new sequence without a token: its number."""
        self.tables[self._next] = Table()
        self._next += 1
        return self._next - 1

    def needed(self, sequence: int, tokens: int) -> int:
        """Free blocks that `append` would take."""
        table = self.tables[sequence]
        return -(-(table.length + tokens) // self.size) - len(table.blocks) + self._copies(table)

    def append(self, sequence: int, tokens: int) -> tuple[int, int] | None:
        """Make room for more tokens of a sequence.

        Args:
            sequence: its number.
            tokens: how many, 1 or more.

        Returns:
            The block that is to be copied before they are written, and where to; None if there is none.

        Raises:
            ValueError: tokens below 1, or not enough free blocks; then nothing has changed.
        """
        table, needed = self.tables[sequence], self.needed(sequence, tokens)
        if tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        if needed > self.free:
            raise ValueError(
                f"{tokens} tokens more need {needed} blocks, and {self.free} of {len(self.counts)} are free: give it more memory"
            )
        copy = None
        if self._copies(table):
            copy = table.blocks[-1], self._take()
            table.blocks[-1] = copy[1]
            self.counts[copy[0]] -= 1
            needed -= 1
        table.blocks += [self._take() for _ in range(needed)]
        table.length += tokens
        return copy

    def fork(self, sequence: int) -> int:
        """A sequence that begins as this one; it takes no block: its number."""
        parent, child = self.tables[sequence], self.open()
        self.tables[child] = Table([*parent.blocks], parent.length)
        for block in parent.blocks:
            self.counts[block] += 1
        return child

    def shorten(self, sequence: int, length: int) -> None:
        """Give up all but the first `length` tokens of a sequence; blocks that nobody else holds are free."""
        table = self.tables[sequence]
        kept = -(-length // self.size)
        for block in table.blocks[kept:]:
            self.counts[block] -= 1
            if not self.counts[block]:
                self._free.append(block)
        del table.blocks[kept:]
        table.length = min(table.length, length)

    def close(self, sequence: int) -> None:
        """Give up a sequence."""
        self.shorten(sequence, 0)
        del self.tables[sequence]

    def _copies(self, table: Table) -> bool:
        """Whether the next token goes into a block that others hold, too."""
        return table.length % self.size > 0 and self.counts[table.blocks[-1]] > 1

    def _take(self) -> int:
        block = self._free.pop()
        self.counts[block] = 1
        return block
