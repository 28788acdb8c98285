r"""A cache for trees that grow: the tokens of each level are read behind those of the levels before.

Where `tree.TreeCache` takes a whole tree in one call, a draft model meets its own tree level by level, since what stands at a node is
guessed from what was read at its parent.

Source: `eagle` (arXiv 2401.15077), the section on the drafting phase; official code SafeAILab/EAGLE@4a9cf3a, eagle/model/cnets.py,
`topK_genrate`, and eagle/model/utils_c.py, `generate_tree_buffers`.

Differs from the paper: batches, whose rows have texts of different lengths.

Not here: keeping a branch: a text goes on from its own tokens, `forget` drops all guesses.
"""

import torch
from torch import Tensor

from refimpl.inference.decoding.ragged_cache import RaggedCache
from refimpl.inference.decoding.tree import Tree


class LevelCache(RaggedCache):
    """Keys and values of rows, and behind them those of a tree as far as it was read; its root is each row's last entry.

    Args:
        reserve: tokens to make room for at once.

    Examples:
        >>> cache, x = LevelCache(), torch.ones(1, 1, 3, 4)
        >>> _ = cache.update(0, x, x, x, torch.arange(3)[None])  # a text of three tokens
        >>> cache.grow(Tree.of([-1, 0, 0, 1, 2]))
        >>> level = x[:, :, :2]
        >>> cache.update(0, level, level, level, torch.tensor([[3, 3]]))[2].tolist()  # both see the text, and themselves
        [[[[0, 1, 2, 3, -1], [0, 1, 2, -1, 3]]]]
        >>> cache.update(0, level, level, level, torch.tensor([[4, 4]]))[2][0, 0, 1].tolist()  # node 4 sees its parent, node 2
        [0, 1, 2, -1, 3, -1, 4]
        >>> cache.forget()
        >>> cache.length
        3
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(reserve)
        self._tree: Tree | None = None
        self._text = self.lengths  # [batch], of the rows without the tree

    def grow(self, tree: Tree) -> None:
        """From here on read this tree behind the rows, level by level, in the order of its nodes and without its root."""
        self._tree, self._text = tree, self.lengths

    def forget(self) -> None:
        """Drop what was read of the tree."""
        if self._tree is not None:
            self.truncate(self._text)
            self._tree = None

    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put each row's new tokens behind its own, and return all; see `refimpl.model.cache.Cache.update`."""
        k, v, told = super().update(layer, k, v, queries, positions)
        if self._tree is None:
            return k, v, told
        tree, nodes = self._tree, len(self._tree.parents)
        last = int((self._layers[layer].lengths - self._text)[0])  # the last node that was read
        new = torch.arange(last + 1 - queries.shape[2], last + 1, device=k.device)
        root = positions[:, :1] - tree.depths[new[:1]]  # [b or 1, 1], its position
        index = torch.arange(k.shape[2], device=k.device) - (
            self._text.to(k.device)[:, None] - 1
        )  # [b, held], 0 at the root
        node = index.clamp(0, nodes - 1)
        known = root + torch.where(index < 0, index, tree.depths[node])
        seen = (index < 0) | (tree.sees[new[:, None, None], node] & (index <= last))  # [new, b, held]
        return k, v, torch.where(seen, known, -1).transpose(0, 1).unsqueeze(1)
