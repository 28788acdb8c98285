"""The radix tree: by hand, and random texts beside a plain list of them."""

import random

from refimpl.inference.system_level.optimization.radix_tree import RadixTree
from tests.inference.system_level.traces import common


def shape(node):
    """Edges as nested lists, for comparison by eye."""
    return {child.tokens: shape(child) for child in node.children.values()}


def test_edges_are_split_by_hand():
    """Oracle: by hand."""
    tree = RadixTree()
    assert tree.match([5]) == ([], tree.root) and tree.insert([], []) == 0
    assert tree.insert([1, 2, 3, 4], [10, 11, 12, 13]) == 0 and shape(tree.root) == {(1, 2, 3, 4): {}}
    assert tree.insert([1, 2, 9], [20, 21, 22]) == 2 and tree.size == 5
    assert shape(tree.root) == {(1, 2): {(3, 4): {}, (9,): {}}}
    assert tree.insert([1, 2, 9, 9, 8], [30, 31, 32, 33, 34]) == 3 and tree.insert([1, 2], [40, 41]) == 2
    assert shape(tree.root) == {(1, 2): {(3, 4): {}, (9,): {(9, 8): {}}}}
    assert tree.match([1, 2, 9, 9, 7])[0] == [10, 11, 22, 33]
    assert shape(tree.root) == {(1, 2): {(3, 4): {}, (9,): {(9,): {(8,): {}}}}} and tree.size == 7


def test_leaves_go_by_their_last_use_and_parents_after_them():
    """Oracle: by hand: of two branches the one that was matched later stays longer, and what they share goes last."""
    tree = RadixTree()
    tree.insert([1, 2, 3], [0, 1, 2])
    tree.insert([1, 2, 4, 5], [0, 1, 3, 4])
    tree.insert([7], [5])
    tree.match([1, 2, 3])
    assert tree.evict(1) == [3, 4]  # a whole edge, of 4 and 5
    assert tree.evict(2) == [5, 2]
    assert tree.evict(9) == [0, 1] and tree.size == 0 and not tree.root.children
    assert tree.evict(1) == []
    tree.insert([1, 2, 3], [0, 1, 2])
    tree.insert([7], [5])
    tree.match([1, 2])  # used later than 7, which goes before it
    assert tree.evict(2) == [2, 5] and tree.evict(1) == [0, 1]


def test_what_is_in_use_stays():
    """Oracle: by hand: a lock holds all that leads to a node, also where an edge is split afterwards."""
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    node = tree.match([1, 2, 3])[1]
    tree.lock(node)
    tree.lock(node)
    assert tree.locked == 3 and tree.evict(9) == [3]
    tree.insert([1, 5], [0, 4])
    assert shape(tree.root) == {(1,): {(2, 3): {}, (5,): {}}} and tree.locked == 3
    tree.unlock(node)
    assert tree.locked == 3 and tree.evict(9) == [4]
    tree.unlock(node)
    assert tree.locked == 0 and tree.evict(1) == [1, 2] and tree.evict(1) == [0]


def test_random_texts_beside_a_list_of_them():
    """Oracle: brute force: the longest common prefix with any text of a list; what was evicted is taken out of the list.

    Every place is of the token that was first put there, nobody loses what is locked, and a leaf that goes was used before all that stay.
    """
    rng, tree = random.Random(0), RadixTree()
    kept, held, texts, place, evicted = {}, [], [], 0, 0  # beginnings that are there to their place; locks
    for _ in range(800):
        base = rng.choice(texts)[: rng.randint(0, 12)] if texts and rng.random() < 0.8 else []
        text = [*base, *(rng.randint(0, 2) for _ in range(rng.randint(1, 6)))]
        longest = max((common(text, other) for other in kept), default=0)
        places, node = tree.match(text)
        assert places == [kept[tuple(text[: i + 1])] for i in range(longest)]
        kind = rng.random()
        if kind < 0.6:
            new = list(range(place, place + len(text)))
            assert tree.insert(text, new) == longest
            kept |= {tuple(text[: i + 1]): new[i] for i in range(longest, len(text))}
            place, texts = place + len(text), [*texts[-60:], text]
        elif kind < 0.75:
            tree.lock(node)
            held.append((node, tuple(text[:longest])))
        elif held and kind < 0.9:
            tree.unlock(held.pop(rng.randrange(len(held)))[0])
        else:
            gone = {*tree.evict(rng.randint(1, 10))}
            evicted += len(gone)
            kept = {text: at for text, at in kept.items() if at not in gone}
            assert all(text[:i] in kept for text in kept for i in range(1, len(text)))
        in_use = {text[:i] for _, text in held for i in range(1, len(text) + 1)}
        assert tree.size == len(kept) and tree.locked == len(in_use) and in_use <= {*kept}
    assert evicted > 150
    for node, _ in held:
        tree.unlock(node)
    assert sorted(tree.evict(10**6)) == sorted(kept.values()) and tree.size == tree.locked == 0
