r"""EAGLE: one more layer continues the target's features and guesses a tree of tokens from them; the target checks it in one call.

Source: `eagle` (arXiv 2401.15077), the sections on the drafting, training and verification phases; official code
SafeAILab/EAGLE@4a9cf3a (branch v1): eagle/model/utils.py (`evaluate_posterior`), eagle/model/choices.py (the tree),
eagle/model/cnets.py, eagle/train/main.py. `feature_draft` is the layer, `feature_tree` the drafting.

Differs from the paper: batches. The layer is trained here, on windows of 64 tokens, at a higher learning rate; there on
ShareGPT. Where all children of a node were refused, the code draws what follows from the corrected chances, and elsewhere from the
target's without the temperature; here the temperature holds everywhere. A guess to which the draft gave no chance is passed over, as in the
code.

Not here: trees that grow with the draft's confidence (EAGLE-2), features of several layers (EAGLE-3), top-k and top-p.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.grow_and_verify import Guesses, choose, follow, grow_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding, check_text
from refimpl.inference.decoding.speculative.feature_draft import FeatureDraft, train_draft
from refimpl.inference.decoding.speculative.feature_tree import FeatureTree
from refimpl.inference.decoding.speculative.speculative_sampling import residual
from refimpl.model.generate import check_arguments, probabilities
from refimpl.model.model import Decoder
from refimpl.model.train import windows

BATCH, LENGTH = 4, 64  # of training; ours

# The official tree: of each node which child it is, from the root on.
TREE: tuple[tuple[int, ...], ...] = (
    *((i,) for i in range(4)),
    *((0, i) for i in range(3)), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    *((0, 0, i) for i in range(3)), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    *((0, 0, 0, i) for i in range(3)),
    *((0, 0, 0, 0, i) for i in range(2)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Eagle(Decoding):
    r"""Guesses of a layer that continues features, checked as a tree.

    Args:
        tree: nodes, as paths from the root; the default is the official one, 25 nodes in 5 levels.
        steps: of training; ours.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> target = initialize_(Decoder(config), generator)
        >>> method = Eagle(steps=3)
        >>> draft = method.prepare(target, None, torch.arange(200) % 5, generator)
        >>> method.decode(target, torch.tensor([[1, 2, 3]]), 30, draft=draft).target_calls < 20
        True
    """

    tree: tuple[tuple[int, ...], ...] = TREE
    steps: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", tuple(tuple(path) for path in self.tree))  # YAML's are lists
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        paths = set(self.tree)
        orphans = [
            path for path in self.tree if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in paths)
        ]
        older = [p for p in self.tree if p and p[-1] > 0 and (*p[:-1], p[-1] - 1) not in paths]
        if not paths or len(paths) < len(self.tree) or orphans or older:
            raise ValueError(
                f"tree={self.tree}: nodes must be distinct paths of numbers from 0 on, with each its parent and its elder "
                f"siblings; wrong: {orphans or older or 'none or twice the same'}"
            )

    def prepare(
        self,
        target: Decoder,
        draft: Decoder | None,  # noqa: ARG002 - a layer of its own drafts
        text: Tensor,
        generator: torch.Generator,
    ) -> FeatureDraft:
        """A layer trained on this text; the target is left as it is.

        Args:
            target: whose features it continues.
            draft: not used.
            text: `[time]` tokens, more than 64.
            generator: source of first weights, batches and noise, on the CPU.

        Raises:
            ValueError: too short a text, or tokens that the target does not have.
        """
        check_text(target, text)
        batches = windows(text.to(target.embedding.weight.device), BATCH, LENGTH, generator)
        made = FeatureDraft(target, generator)
        train_draft(made, target, batches, self.steps, generator)
        return made

    def decode(
        self,
        target: Decoder,
        tokens: Tensor,
        n: int,
        *,
        draft: nn.Module | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop: Collection[int] = (),
        padding: Tensor | None = None,
    ) -> Decoded:
        """Continue prompts by up to n tokens; see `protocol.Decoding.decode`.

        Args:
            target: the model whose distribution the tokens follow.
            tokens: `[batch, time]`, the prompts, padded at the left.
            n: new tokens, 1 or more.
            draft: what `prepare` made.
            temperature: of target and draft; 0 is greedy.
            generator: source of the draws, on the model's device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range; no draft, or that of another target.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        width = target.config.d_model
        if not isinstance(draft, FeatureDraft) or draft.fc.out_features != width:
            raise ValueError(
                f"draft={type(draft).__name__} must continue features of {width} entries: pass what `prepare` made"
            )
        grower = FeatureTree(
            draft, target, self.tree, temperature=temperature, generator=generator, padding=padding, tokens=tokens, n=n
        )

        def rule(guesses: Guesses, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if temperature == 0:
                return follow(guesses, hidden, lambda at: choose(target, at, temperature=0.0, generator=None))
            p_target = probabilities(target.logits(hidden), temperature)
            return accept_siblings(guesses, p_target, grower.drawn_from, generator)

        return grow_and_verify(
            target, tokens, n, grower, rule, stop=stop, padding=padding, see_prompt=grower.see_prompt
        )


def accept_siblings(
    guesses: Guesses, p_target: Tensor, q_draft: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The rule above temperature 0: siblings x are tried in turn, each kept with probability $\min(1, p(x)/q(x))$.

    Where one is refused, p becomes what q lacks of it, $\max(0, p - q)$, normalized, and the next sibling was drawn from q without
    those before, normalized. Where all were refused, what follows is drawn from what is left of p.

    Args:
        guesses: siblings in the order in which they were drawn, without replacement.
        p_target: `[batch, nodes, vocabulary]` of what follows each node.
        q_draft: `[batch, nodes with children, vocabulary]` that children were drawn from, in the tree's order.
        generator: source of the draws.

    Returns:
        Nodes from the root on, `[batch, depth + 1]`; how many behind the root stand; the token that follows: `[batch]` each.
    """
    families, which = _families(guesses.tree.parents.tolist(), p_target.device)
    row = torch.arange(len(p_target), device=p_target.device)
    node = torch.zeros_like(row)
    path, kept, going = [node], torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)
    p = p_target[:, 0]
    for depth in range(1, int((guesses.open * guesses.tree.depths).max()) + 1):
        q = q_draft[row, which[node]]
        following, found = node, torch.zeros_like(going)
        for child in families[node].T:
            token = guesses.tokens[row, child.clamp(min=0)][:, None]
            p_guess, q_guess = p.gather(1, token).squeeze(1), q.gather(1, token).squeeze(1)
            tried = going & ~found & (child >= 0) & guesses.open[row, child.clamp(min=0)] & (q_guess > 0)
            uniform = torch.rand(len(row), generator=generator, device=p.device)
            stands = tried & (uniform * q_guess < p_guess)
            following, found = torch.where(stands, child, following), found | stands
            refused = (tried & ~stands)[:, None]
            p = torch.where(refused, residual(p, q), p)
            q = torch.where(refused, _without(q, token), q)
        going = going & found
        node = torch.where(going, following, node)
        p = torch.where(going[:, None], p_target[row, node], p)
        kept = torch.where(going, depth, kept)
        path.append(node)
        if not bool(going.any()):
            break
    return torch.stack(path, dim=1), kept, torch.multinomial(p, 1, generator=generator).squeeze(1)


def _without(q: Tensor, token: Tensor) -> Tensor:
    """The chances `[batch, vocabulary]` of a draw that was not this token `[batch, 1]`; 0 where there is no other."""
    rest = q.scatter(1, token, 0.0)
    return rest / rest.sum(dim=1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def _families(parents: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Children of each node, `[nodes, most]`, -1 behind the last; and of each node with children its number among these, `[nodes]`."""
    children: list[list[int]] = [[] for _ in parents]
    for i, parent in enumerate(parents[1:], start=1):
        children[parent].append(i)
    most = max(1, *(len(own) for own in children)) if len(children) > 1 else 1
    table = torch.tensor([own + [-1] * (most - len(own)) for own in children], device=device)
    return table, ((table[:, 0] >= 0).cumsum(0) - 1).clamp(min=0)
