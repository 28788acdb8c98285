r"""Guesses from features: a tree of fixed shape, grown level by level by a draft that reads its own features.

Source: `eagle` (arXiv 2401.15077), the section on the drafting phase; official code SafeAILab/EAGLE@4a9cf3a, eagle/model/cnets.py,
`topK_genrate` (what is read, level by level), `sample` (siblings).

Differs from the paper: batches; the tree ends where no row has room for more. Of each node as many tokens are drawn as it has
children; the code draws ten, and uses the first of them.

Not here: trees whose shape follows the draft's confidence (EAGLE-2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refimpl.inference.decoding.draft_and_verify import SLACK, Rows
from refimpl.inference.decoding.grow_and_verify import Guesses
from refimpl.inference.decoding.level_cache import LevelCache
from refimpl.inference.decoding.speculative.feature_draft import FeatureDraft
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import probabilities
from refimpl.model.model import Decoder


class Shape:
    """A tree, and what is to be done on each of its levels.

    Args:
        paths: of each node which child it is, from the root on; with a path all that it begins with are there.
        device: of the tree.

    Attributes:
        depth: levels behind the root.
        widest: children of a node at most.

    Examples:
        >>> shape = Shape([(0,), (1,), (0, 0), (0, 1)])
        >>> shape.upto(2).parents.tolist(), shape.upto(1).parents.tolist(), shape.depth, shape.widest
        ([-1, 0, 0, 1, 1], [-1, 0, 0], 2, 2)
    """

    def __init__(self, paths: Sequence[tuple[int, ...]], device: torch.device | None = None) -> None:
        self.paths = [(), *sorted(paths, key=lambda path: (len(path), path))]
        place = {path: i for i, path in enumerate(self.paths)}
        self._device, self._trees = device, dict[int, Tree]()
        self._parents = [place[path[:-1]] if path else -1 for path in self.paths]
        inner = [i for i in range(len(self.paths)) if i in self._parents]
        self.depth = len(self.paths[-1])
        self.widest = max((path[-1] + 1 for path in self.paths if path), default=0)
        self.inner = Tree.of([inner.index(self._parents[i]) if i else -1 for i in inner], device)
        levels = [[i for i in inner if len(self.paths[i]) == depth] for depth in range(self.depth)]
        behind = [[i for i, path in enumerate(self.paths) if len(path) == depth + 1] for depth in range(self.depth)]
        # of the nodes of level d + 1: which node with children of level d each stands behind, and which child of it it is
        self.slots = [
            torch.tensor([levels[d].index(self._parents[i]) for i in nodes], device=device)
            for d, nodes in enumerate(behind)
        ]
        self.ranks = [torch.tensor([self.paths[i][-1] for i in nodes], device=device) for nodes in behind]
        # of the nodes with children of level d: which of the nodes of level d they are
        self.fertile = [
            torch.tensor([i - sum(len(path) < d for path in self.paths) for i in nodes], device=device)
            for d, nodes in enumerate(levels)
        ]

    def upto(self, depth: int) -> Tree:
        """The tree without what is deeper."""
        if depth not in self._trees:
            parents = [p for p, path in zip(self._parents, self.paths, strict=True) if len(path) <= depth]
            self._trees[depth] = Tree.of(parents, self._device)
        return self._trees[depth]


class FeatureTree:
    """A `grow_and_verify.Grower`.

    Args:
        draft: continues features.
        target: whose output layer makes tokens of them.
        paths: the tree, as in `Shape`; children that there are no tokens for are left out.
        temperature: 0 guesses the likeliest tokens, above 0 draws distinct ones.
        generator: source of the draws.
        padding: of the prompts.
        tokens: `[batch, time]`, the prompts.
        n: new tokens.

    Attributes:
        calls: of the draft so far.
        drawn_from: `[batch, nodes with children, vocabulary]` of this round: the draft's chances of what follows each, in the order of
            the tree; at temperature 0 there are none.
    """

    def __init__(
        self,
        draft: FeatureDraft,
        target: Decoder,
        paths: Sequence[tuple[int, ...]],
        *,
        temperature: float,
        generator: torch.Generator | None,
        padding: Tensor | None,
        tokens: Tensor,
        n: int,
    ) -> None:
        self.draft, self.target, self.temperature, self.generator = draft, target, temperature, generator
        few = target.config.vocabulary
        self.shape = Shape([path for path in paths if max(path) < few], tokens.device)
        self.padding, self.cache, self.calls = padding, LevelCache(tokens.shape[1] + n + SLACK), 0
        self.drawn_from = target.embedding.weight.new_zeros(len(tokens), 0, few)
        self._features: Tensor | None = None  # [b, time, d_model] of the target, that the draft has yet to read

    def see_prompt(self, hidden: Tensor) -> None:
        """The target has read the prompts: `[batch, time, d_model]`."""
        self._features = hidden

    def learn(self, rows: Rows, guesses: Guesses, hidden: Tensor, path: Tensor, kept: Tensor) -> None:  # noqa: ARG002
        """Keep the features of the tokens that stood; those of a row's further nodes are read for nothing, and forgotten."""
        if len(guesses.tree.parents) > 1 or self.cache.length > 0:
            row = torch.arange(len(path), device=path.device)[:, None]
            self._features = hidden[row, path[:, : int(kept.max()) + 1]]

    def propose(self, rows: Rows) -> Guesses:
        """The tree behind each row's last token; before the prompt is read, and where there is no room, that token alone."""
        depth = min(self.shape.depth, int(rows.room.max()))
        levels, drawn_from = [rows.last(1)], []
        if self._features is None or depth == 0:
            root = torch.zeros_like(levels[0], dtype=torch.bool)
            return Guesses(Tree.of([-1], root.device), levels[0], root)
        features = self._read(rows, self._features)  # [b, nodes with children, d_model]
        self.cache.grow(self.shape.inner)
        at = rows.lengths.to(features.device) - 2  # where the pair of a row's last token stands
        at = (at if self.padding is None else at - self.padding.to(features.device))[:, None]
        for level in range(depth):
            slots, ranks = self.shape.slots[level], self.shape.ranks[level]
            picked, chances = self._pick(self.target.logits(features))
            drawn_from.append(chances)
            levels.append(picked[:, slots, ranks])
            if level + 1 < depth:
                fertile = self.shape.fertile[level + 1]
                positions = (at + level + 1).expand(-1, len(fertile))
                features = self._call(levels[-1][:, fertile], features[:, slots[fertile]], None, positions)
        self.cache.forget()
        self.drawn_from = torch.cat(drawn_from, dim=1)
        tokens = torch.cat(levels, dim=1)
        return Guesses(
            self.shape.upto(depth), tokens, (torch.arange(tokens.shape[1]) > 0).to(tokens.device).expand_as(tokens)
        )

    def _read(self, rows: Rows, features: Tensor) -> Tensor:
        """Read the target's own features beside the tokens behind them; what is expected next of each row, `[batch, 1, d_model]`."""
        start = self.cache.lengths if self.cache.length else torch.zeros_like(rows.lengths)
        places = start[:, None] + 1 + torch.arange(features.shape[1])
        tokens = rows.text.gather(1, places.clamp(max=rows.text.shape[1] - 1).to(rows.text.device))
        found = self._call(tokens, features, self.cache.shifted(self.padding), None)
        self.cache.truncate(rows.lengths - 1)  # of an ended row nothing is kept, and of the others what stood
        last = (rows.lengths - 2 - start).clamp(min=0).to(found.device)
        return found[torch.arange(len(found), device=found.device), last][:, None]

    def _call(self, tokens: Tensor, features: Tensor, padding: Tensor | None, positions: Tensor | None) -> Tensor:
        self.calls += 1
        return self.draft(self.target, tokens, features, self.cache, padding, positions)  # type: ignore[no-any-return]

    def _pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct tokens behind each node, `[batch, nodes, widest]`, and the chances that they were drawn with."""
        if self.temperature == 0:
            return logits.topk(self.shape.widest, dim=-1).indices, logits[..., :0]
        chances = probabilities(logits, self.temperature)
        return distinct(chances, self.shape.widest, self.generator), chances


def distinct(chances: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draws without replacement, in their order: of waiting times that are exponential with these rates, the shortest.

    Args:
        chances: `[..., vocabulary]`.
        count: draws; what has no chance comes after all that has one.
        generator: source of the draws.

    Returns:
        `[..., count]`.

    Examples:
        >>> distinct(torch.tensor([0.0, 1.0, 0.0]), 1, torch.Generator().manual_seed(0)).tolist()
        [1]
    """
    waiting = torch.empty_like(chances).exponential_(generator=generator)
    return (chances / waiting).topk(count, dim=-1).indices
