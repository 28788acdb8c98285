"""The books of a memory of blocks: by hand, and a hundred thousand random operations beside a plain model of them."""

import random
from collections import Counter

import pytest

from refimpl.inference.system_level.blocks import Blocks


def test_growing_forking_and_closing_by_hand():
    """Oracle: by hand, blocks of four tokens: a full block is shared for ever, one that is not full until somebody writes into it."""
    blocks = Blocks(count=6, size=4)
    first = blocks.open()
    assert blocks.needed(first, 4) == 1 and blocks.append(first, 4) is None
    assert blocks.append(first, 2) is None and blocks.tables[first].blocks == [0, 1] and blocks.unused == 2
    second, third = blocks.fork(first), blocks.fork(first)
    assert blocks.counts == [3, 3, 0, 0, 0, 0] and blocks.free == 4
    assert blocks.needed(second, 1) == 1 and blocks.append(second, 1) == (1, 2)
    assert blocks.needed(third, 3) == 2 and blocks.append(third, 3) == (1, 3)
    assert blocks.tables[third].blocks == [0, 3, 4] and blocks.counts == [3, 1, 1, 1, 1, 0]
    assert blocks.needed(first, 2) == 0 and blocks.append(first, 2) is None  # the last holder writes into it as it is
    blocks.close(first)
    assert blocks.counts == [2, 0, 1, 1, 1, 0] and blocks.free == 2 and blocks.taken == 4
    blocks.close(second)
    blocks.close(third)
    assert blocks.counts == [0] * 6 and blocks.free == 6 and not blocks.tables


def test_a_full_block_is_not_copied():
    """Oracle: by hand."""
    blocks = Blocks(count=3, size=4)
    parent = blocks.open()
    blocks.append(parent, 4)
    child = blocks.fork(parent)
    assert blocks.append(child, 1) is None and blocks.counts == [2, 1, 0]


def test_what_does_not_fit_changes_nothing():
    """Oracle: the books before."""
    blocks = Blocks(count=2, size=4)
    parent = blocks.open()
    blocks.append(parent, 6)
    child = blocks.fork(parent)
    with pytest.raises(ValueError, match="1 tokens more need 1 blocks, and 0 of 2 are free"):
        blocks.append(child, 1)
    assert blocks.counts == [2, 2] and blocks.tables[child].length == 6
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        blocks.append(parent, 0)
    for count, size in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match=f"count={count} and size={size}"):
            Blocks(count, size)


def test_a_hundred_thousand_random_operations():
    """Oracle: a plain model: each sequence's own list of tokens, and a memory into which every token is written and from which it is read again.

    So a block that two write into, one that is given to two, and a copy that is missing would all be seen as a wrong token; counts are
    those of the tables, counted anew; free blocks and taken ones are all there are.
    """
    rng, blocks, size = random.Random(0), Blocks(count=64, size=4), 4
    texts, memory, done, refused, copies = {}, {}, Counter(), 0, 0
    for step in range(100_000):
        kind = rng.choice(("open", "append", "append", "append", "fork", "close"))
        if kind == "open" and len(texts) < 40:
            texts[blocks.open()] = []
        elif texts:
            sequence = (
                rng.choice(list(texts)) if kind != "append" else next(iter(texts)) if step % 3 else list(texts)[-1]
            )
            if kind == "append":
                tokens = rng.randint(1, 6)
                if blocks.needed(sequence, tokens) > blocks.free:
                    refused += 1
                    kind = "close"
                else:
                    copy = blocks.append(sequence, tokens)
                    if copy:
                        copies += 1
                        for offset in range(size):
                            memory[copy[1], offset] = memory.get((copy[0], offset))
                    table = blocks.tables[sequence].blocks
                    for _ in range(tokens):
                        at = len(texts[sequence])
                        memory[table[at // size], at % size] = step
                        texts[sequence].append(step)
            if kind == "fork" and len(texts) < 40:
                texts[blocks.fork(sequence)] = [*texts[sequence]]
            if kind == "close":
                table = blocks.tables[sequence].blocks
                assert [memory[table[at // size], at % size] for at in range(len(texts[sequence]))] == texts.pop(
                    sequence
                )
                blocks.close(sequence)
        done[kind] += 1
        if step % 500 == 0:
            counts = Counter(block for table in blocks.tables.values() for block in table.blocks)
            assert blocks.counts == [counts[block] for block in range(64)]
            assert blocks.taken == len(counts) and blocks.free == 64 - len(counts)
            assert {number: table.length for number, table in blocks.tables.items()} == {
                n: len(t) for n, t in texts.items()
            }
            assert blocks.unused < size * max(1, len(texts))
    assert min(done.values()) > 10_000 and refused > 1000 and copies > 1000
    for sequence in list(texts):
        blocks.close(sequence)
    assert blocks.counts == [0] * 64 and blocks.free == 64 and not blocks.tables
