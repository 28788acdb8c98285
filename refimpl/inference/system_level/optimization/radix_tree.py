r"""A radix tree over tokens: which texts' entries are in memory, where, and which of them may go.

An edge holds a run of tokens and the place of each one's entry. A text that leaves an edge in its middle splits it.

Source: `sglang` (arXiv 2312.07104), Section 3 and Figure 3; official code
sgl-project/sglang@006b0e3d317f1cd4a7300e919a4eaa878b1947e7, python/sglang/srt/mem_cache/radix_cache.py, page size 1.

Differs from the paper: none; from the code: where an edge is split, the part that was not matched keeps the time of its last use.

Not here: pages of more than a token, priorities other than the last use, a second memory behind this one.
"""

import heapq
from collections.abc import Iterator, Sequence


class Node:
    """An edge and what hangs below it.

    Attributes:
        tokens: of the edge; none at the root.
        places: where their entries lie.
        children: by their first token.
        parent: None at the root.
        locks: requests that use it.
        last_use: when a text was last matched through it.
    """

    def __init__(self, tokens: Sequence[int], places: Sequence[int], parent: "Node | None", last_use: int) -> None:
        self.tokens, self.places, self.parent, self.last_use = tuple(tokens), list(places), parent, last_use
        self.children: dict[int, Node] = {}
        self.locks = 0


class RadixTree:
    """Texts, and the places of their entries.

    Attributes:
        size: entries in the tree.
        locked: of these, those that requests use.

    Examples:
        >>> tree = RadixTree()
        >>> tree.insert([5, 7, 33, 2], [10, 11, 12, 13])
        0
        >>> tree.insert([5, 7, 8], [20, 21, 22])  # two of them are there; place 22 is taken in
        2
        >>> places, node = tree.match([5, 7, 8, 9])
        >>> places, node.tokens
        ([10, 11, 22], (8,))
        >>> tree.lock(node)
        >>> tree.evict(9), tree.size  # all but what is locked
        ([12, 13], 3)
    """

    def __init__(self) -> None:
        self.root = Node((), (), None, 0)
        self.size, self.locked, self._clock = 0, 0, 0

    def match(self, text: Sequence[int]) -> tuple[list[int], Node]:
        """The longest beginning of a text that is there: its places, and the node that it ends with; this counts as its use."""
        self._clock += 1
        node, places = self.root, list[int]()
        while len(places) < len(text) and text[len(places)] in node.children:
            child = node.children[text[len(places)]]
            common = common_prefix(child.tokens, text, len(places))
            node = child if common == len(child.tokens) else self._split(child, common)
            node.last_use = self._clock
            places += node.places
            if common < len(node.tokens):
                break
        return places, node

    def insert(self, text: Sequence[int], places: Sequence[int]) -> int:
        """Take in a text with a place for each token; of those that are there already, the places are not taken.

        Returns:
            How many of its tokens were there.
        """
        found, node = self.match(text)
        if len(found) < len(text):
            new = Node(text[len(found) :], places[len(found) :], node, self._clock)
            node.children[new.tokens[0]] = new
            self.size += len(new.tokens)
        return len(found)

    def lock(self, node: Node) -> None:
        """A request uses what leads to this node: it stays."""
        for above in self._path(node):
            above.locks += 1
            self.locked += len(above.tokens) if above.locks == 1 else 0

    def unlock(self, node: Node) -> None:
        """It does so no more."""
        for above in self._path(node):
            above.locks -= 1
            self.locked -= len(above.tokens) if above.locks == 0 else 0

    def evict(self, entries: int) -> list[int]:
        """Take out leaves that nobody uses, the least recently used first, until so many entries are free or none is left.

        Returns:
            Their places; the last leaf may bring more than was asked for.
        """
        leaves = [(node.last_use, id(node), node) for node in self._nodes() if not node.children and not node.locks]
        heapq.heapify(leaves)
        freed: list[int] = []
        while leaves and len(freed) < entries:
            _, _, leaf = heapq.heappop(leaves)
            freed += leaf.places
            self.size -= len(leaf.tokens)
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.tokens[0]]
            if parent is not self.root and not parent.children and not parent.locks:
                heapq.heappush(leaves, (parent.last_use, id(parent), parent))
        return freed

    def _split(self, node: Node, at: int) -> Node:
        """Put a node between this one and its parent, with the first tokens of its edge."""
        assert node.parent is not None
        upper = Node(node.tokens[:at], node.places[:at], node.parent, node.last_use)
        upper.locks = node.locks
        upper.children[node.tokens[at]] = node
        node.parent.children[node.tokens[0]] = upper
        node.parent, node.tokens, node.places = upper, node.tokens[at:], node.places[at:]
        return upper

    def _path(self, node: Node) -> Iterator[Node]:
        while node.parent is not None:
            yield node
            node = node.parent

    def _nodes(self) -> Iterator[Node]:
        """All but the root."""
        stack = [*self.root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def common_prefix(tokens: Sequence[int], text: Sequence[int], start: int) -> int:
    """How many of the tokens are those of the text from `start` on.

    Examples:
        >>> common_prefix((7, 8, 9), [5, 7, 8, 2], 1)
        2
    """
    most = min(len(tokens), len(text) - start)
    return next((i for i in range(most) if tokens[i] != text[start + i]), most)
