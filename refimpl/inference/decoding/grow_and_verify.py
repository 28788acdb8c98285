r"""The loop of all methods that guess many continuations at once, as a tree, and let the target check them in one call.

A method brings a grower, which guesses, and a rule, which says which branch stands, how far, and what follows it. All else is as in
`draft_and_verify`: rows go on at their own pace, each to its own end.

Source: `medusa` (arXiv 2401.10774), the sections on tree attention and on acceptance; `lookahead-decoding` (arXiv 2402.02057), the
section on sampling; official code FasterDecoding/Medusa@e2a5d20, medusa/model/medusa_model.py, `medusa_generate`, and
hao-ai-lab/LookaheadDecoding@eed010d, lade/decoding.py, `jacobi_sample_multilevel`.

Differs from the paper: batches. A guess stands if it is what the target draws, or likeliest, at its parent. Where guesses are
certain, that is the rule that takes sibling guesses x in turn with probability p(x), sets p(x) to 0 where one is refused, and draws
the rest from what is left: either way a token comes with its p.

Not here: guesses that were drawn from a distribution, whose probabilities a rule must know; merging of branches that begin alike,
which are followed together.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refimpl.inference.decoding.draft_and_verify import SLACK, Rows, Tally
from refimpl.inference.decoding.protocol import Decoded
from refimpl.inference.decoding.tree import Tree, TreeCache
from refimpl.model.generate import chosen
from refimpl.model.model import Decoder


@dataclass(frozen=True)
class Guesses:
    """A round's tokens.

    Attributes:
        tree: their shape.
        tokens: `[batch, nodes]`; at the root each row's last token.
        open: `[batch, nodes]`, which of them are guesses that may stand. Others are read for what the target says behind them.
    """

    tree: Tree
    tokens: Tensor
    open: Tensor


class Grower(Protocol):
    """What guesses, in one call of `decode`."""

    @property
    def calls(self) -> int:
        """Forwards of a draft model so far."""
        ...

    def propose(self, rows: Rows) -> Guesses:
        """Guess what follows each row."""
        ...

    def learn(self, rows: Rows, guesses: Guesses, hidden: Tensor, path: Tensor, kept: Tensor) -> None:
        """See what became of the guesses.

        Args:
            rows: with the tokens that were taken.
            guesses: of this round.
            hidden: `[batch, nodes, d_model]` of the target.
            path: `[batch, depth + 1]` nodes, from the root on; what lies behind `kept` means nothing.
            kept: `[batch]` guesses that stand.
        """
        ...


# From guesses and hidden states: `path` and `kept` as above, and the token that follows, `[batch]`.
TreeRule = Callable[[Guesses, Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def grow_and_verify(
    target: Decoder,
    tokens: Tensor,
    n: int,
    grower: Grower,
    rule: TreeRule,
    *,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    see_prompt: Callable[[Tensor], None] | None = None,
) -> Decoded:
    """Continue prompts by up to n tokens; arguments as in `protocol.Decoding.decode`, checked before.

    A grower that must know what the target made of the prompts is shown their hidden states, `[batch, time, d_model]`, by `see_prompt`.
    """
    time = tokens.shape[1]
    rows, cache = Rows.begin(tokens, n, stop), TreeCache(time + n + SLACK)
    tally = Tally()
    row = torch.arange(len(tokens))
    while bool(rows.running.any()):
        ran, guesses = rows.running, grower.propose(rows)
        within = guesses.tree.depths <= rows.room[:, None].to(tokens.device)
        guesses = Guesses(guesses.tree, guesses.tokens, guesses.open & within)
        first = cache.length == 0
        hidden = _read(target, rows, guesses, cache, padding)
        if first and see_prompt is not None:
            see_prompt(hidden)
        hidden = hidden[:, -len(guesses.tree.parents) :]
        path, kept, following = rule(guesses, hidden)
        cache.keep(path, kept)
        taken = rows.append(guesses.tokens.gather(1, path[:, 1:]), kept, following)
        offered, stand = guesses.open.cpu(), kept.cpu()
        depths = (offered * guesses.tree.depths.cpu()).amax(dim=1)
        last = path.cpu()[row, stand]
        refused = (offered & (guesses.tree.parents.cpu() == last[:, None])).any(dim=1) & (taken > stand)
        tally.add(ran, offered.shape[1], offered.sum(dim=1), depths, taken.minimum(stand), refused)
        grower.learn(rows, guesses, hidden, path, kept)
    return tally.decoded(rows.new(time), grower.calls)


def _read(target: Decoder, rows: Rows, guesses: Guesses, cache: TreeCache, padding: Tensor | None) -> Tensor:
    """Hidden states `[batch, nodes, d_model]`; the first time, the prompts are read in the same call, and theirs come before."""
    tree, tokens = guesses.tree, guesses.tokens
    if cache.length == 0:
        before = rows.text[:, : int(rows.lengths[0]) - 1]
        tokens, left = torch.cat((before, tokens), dim=1), torch.zeros_like(rows.lengths)
        if not tree.is_chain:  # behind a text a chain is a chain, and who sees whom need not be written down
            tree = tree.behind(before.shape[1])
    else:
        cache.truncate(rows.lengths - 1)
        left = cache.lengths
    if tree.is_chain:
        hidden = target.hidden(tokens, cache, cache.shifted(padding))
    else:
        first = left.to(tokens.device) if padding is None else left.to(tokens.device) - padding.to(tokens.device)
        cache.tree = tree
        hidden = target.hidden(tokens, cache, positions=first[:, None] + tree.depths)
    cache.tree = guesses.tree
    return hidden


def follow(guesses: Guesses, hidden: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The rule for guesses that were certain: take what the target chooses, and go on where somebody guessed it.

    Args:
        guesses: of which the open ones may stand; branches that begin alike are followed together.
        hidden: `[batch, nodes, d_model]`.
        choose: from `[batch, d_model]` to the target's choice there, `[batch]`: the likeliest token, or a draw.

    Returns:
        Nodes from the root on, `[batch, depth + 1]`; how many behind the root stand; the token that follows: `[batch]` each.
    """
    batch = len(hidden)
    row = torch.arange(batch, device=hidden.device)
    node = torch.zeros(batch, dtype=torch.int64, device=hidden.device)
    alive = torch.zeros_like(guesses.open)
    alive[:, 0] = True
    path, kept = [node], torch.zeros_like(node)
    going = torch.ones_like(node, dtype=torch.bool)
    following = choose(hidden[:, 0])
    for depth in range(1, int((guesses.open * guesses.tree.depths).max()) + 1):
        alive = alive[:, guesses.tree.parents] & guesses.open & (guesses.tokens == following[:, None])
        going = going & alive.any(dim=1)
        node = torch.where(going, alive.int().argmax(dim=1), node)
        path.append(node)
        kept = torch.where(going, depth, kept)
        if not bool(going.any()):
            break
        following = torch.where(going, choose(hidden[row, node]), following)
    return torch.stack(path, dim=1), kept, following


def choose(target: Decoder, hidden: Tensor, *, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The target's choice of a token, `[batch]`, from hidden states `[batch, d_model]`: the likeliest at temperature 0, or a draw."""
    return chosen(target.logits(hidden), temperature, generator)
