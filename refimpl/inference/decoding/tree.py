r"""Tokens that form a tree: branches behind one text, read in one call, of which one is kept.

Each token stands one behind its parent, and sees the text and its own ancestors, so that a call gives for every branch what it
would give for that branch alone. The keys and values of the branch that is kept move to where a plain text's would stand.

Source: `medusa` (arXiv 2401.10774), the section on tree attention; official code FasterDecoding/Medusa@e2a5d20,
medusa/model/utils.py, `generate_medusa_buffers` and `update_inference_inputs`. The mask of `lookahead-decoding` (arXiv 2402.02057),
hao-ai-lab/LookaheadDecoding@eed010d, lade/models/modeling_llama.py, `j_make_causal_mask_multilevel`, is that of a tree, too.

Differs from the paper: batches, whose rows have texts of different lengths.

Not here: trees that differ from row to row in shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.decoding.ragged_cache import RaggedCache


@dataclass(frozen=True)
class Tree:
    """Who stands behind whom; node 0 is the root, a row's last token.

    Attributes:
        parents: `[nodes]`, each before its children; -1 of the root.
        depths: `[nodes]`, steps from the root.
        sees: `[nodes, nodes]`, whether a node (first) has another among its ancestors, itself included.
    """

    parents: Tensor
    depths: Tensor
    sees: Tensor

    @classmethod
    def of(cls, parents: Sequence[int], device: torch.device | None = None) -> "Tree":
        """The tree with these parents.

        Raises:
            ValueError: a parent that does not come before its child, or a second root.

        Examples:
            >>> tree = Tree.of([-1, 0, 0, 2])
            >>> tree.depths.tolist(), tree.sees[3].tolist(), tree.is_chain
            ([0, 1, 1, 2], [True, False, True, True], False)
        """
        if not parents or parents[0] != -1 or any(not 0 <= parent < i for i, parent in enumerate(parents) if i):
            raise ValueError(f"parents={[*parents]} must begin with -1, and each further one come before its child")
        sees = torch.eye(len(parents), dtype=torch.bool)
        for i, parent in enumerate(parents[1:], start=1):
            sees[i] |= sees[parent]
        return cls(torch.tensor(parents, device=device), (sees.sum(dim=1) - 1).to(device), sees.to(device))

    @property
    def is_chain(self) -> bool:
        """Whether each node stands behind the one before it."""
        return int(self.depths[-1]) == len(self.depths) - 1

    def behind(self, count: int) -> "Tree":
        """The tree behind a chain of `count` tokens, whose first becomes the root."""
        chain = range(-1, count - 1)
        return Tree.of([*chain, *(parent + count for parent in self.parents.tolist())], self.parents.device)


class TreeCache(RaggedCache):
    """Keys and values of rows, of which the last read may be a tree.

    Args:
        reserve: tokens to make room for at once.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(reserve)
        self.tree: Tree | None = None  # of the tokens that are read next
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None  # of one call, for all its layers

    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put each row's new tokens behind its own, and return all; see `refimpl.model.cache.Cache.update`."""
        k, v, told = super().update(layer, k, v, queries, positions)
        if self.tree is None:
            return k, v, told
        start = self._layers[layer].lengths - len(self.tree.parents)
        if self._seen is None or self._seen[0] is not positions or not torch.equal(self._seen[1], start):
            self._seen = positions, start, self._positions(self.tree, start, k.shape[2], positions)
        return k, v, self._seen[2]

    def keep(self, path: Tensor, kept: Tensor) -> None:
        """Of the tree that was read, keep the root and the first `kept` `[batch]` of the nodes behind it on `path` `[batch, depth + 1]`."""
        if self.tree is None:
            raise RuntimeError("no tree was read")  # only our own bug
        nodes, rows = len(self.tree.parents), torch.arange(len(path), device=path.device)[:, None]
        for layer in self._layers.values():
            start = layer.lengths - nodes
            begin = start.to(path.device)[:, None]
            places = begin + torch.arange(path.shape[1], device=path.device)
            for held in (layer.k, layer.v):
                held[rows, :, places] = held[rows, :, begin + path]  # the right side is a copy
            layer.lengths = start + 1 + kept.cpu()
        self.tree = self._seen = None

    @staticmethod
    def _positions(tree: Tree, start: Tensor, held: int, positions: Tensor) -> Tensor:
        """Of all entries, for each node as it sees them: `[batch, 1, nodes, held]`, -1 where it does not."""
        nodes, at = len(tree.parents), start.to(positions.device)[:, None]
        index = torch.arange(held, device=positions.device) - at  # [b, held], 0 at the root
        node = index.clamp(0, nodes - 1)
        past = index + positions[:, :1]
        known = torch.where(index < 0, past, positions.expand(len(at), -1).gather(1, node))
        seen = (index < 0) | (tree.sees[:, node] & (index < nodes))  # [nodes, b, held]
        return torch.where(seen, known, -1).transpose(0, 1).unsqueeze(1)
