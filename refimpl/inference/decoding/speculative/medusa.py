r"""Medusa: heads on the target's last hidden state guess several tokens ahead; a tree of their combinations is checked in one call.

Source: `medusa` (arXiv 2401.10774), the sections on Medusa heads, tree attention, Medusa-1 and typical acceptance; official code
FasterDecoding/Medusa@e2a5d20: medusa/model/medusa_model.py (`medusa_generate`), medusa/model/utils.py (`evaluate_posterior`),
medusa/eval/gen_results.py (`explore_graph`), medusa/train/train_legacy.py.

Differs from the paper: batches. Heads are trained here, in 100 steps on 256 tokens each, at the official learning rate; there on
ShareGPT for two epochs. Which combinations are in the tree is found from the heads' hits on the same text, by the official rule;
there from other text. A head has no bias, as in the paper's formula and not as in the code. A branch ends where the tree has it end;
the code fills it up to the longest with token 0, which then may stand, too.

Not here: Medusa-2, which trains the target with the heads; self-distillation; nucleus sampling.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.draft_and_verify import Rows
from refimpl.inference.decoding.grow_and_verify import Guesses, TreeRule, choose, follow, grow_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding, check_text
from refimpl.inference.decoding.speculative.medusa_heads import TOP, MedusaHeads, likeliest_paths, train_heads
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import check_arguments, probabilities
from refimpl.model.model import Decoder
from refimpl.model.train import windows

BATCH, LENGTH, MEASURED = 4, 64, 8  # of training; batches that heads are measured on for the tree; ours


@dataclass(frozen=True, kw_only=True)
class Medusa(Decoding):
    r"""Guesses of heads, checked as a tree.

    Args:
        heads: tokens that are guessed ahead; the official trees are 4 deep.
        nodes: guesses in the tree.
        acceptance: above temperature 0, `typical` keeps what is plausible, `exact` what the target would have drawn.
        epsilon: $\epsilon$ of the typical; $\delta$ is its root, as the official code recommends.
        steps: of training; ours.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> target = initialize_(Decoder(config), generator)
        >>> method = Medusa(heads=2, nodes=5, steps=3)
        >>> heads = method.prepare(target, None, torch.arange(200) % 5, generator)
        >>> method.decode(target, torch.tensor([[1, 2, 3]]), 30, draft=heads).target_calls < 20
        True
    """

    heads: int = 4
    nodes: int = 63
    acceptance: Literal["typical", "exact"] = "typical"
    epsilon: float = 0.09
    steps: int = 100

    def __post_init__(self) -> None:
        for name in ("heads", "nodes", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.acceptance not in ("typical", "exact"):
            raise ValueError(f"acceptance={self.acceptance!r} must be 'typical' or 'exact'")
        if not 0 < self.epsilon <= 1:
            raise ValueError(
                f"epsilon={self.epsilon} is a probability, and must be in (0, 1]; the official code has 0.09"
            )

    def prepare(
        self,
        target: Decoder,
        draft: Decoder | None,  # noqa: ARG002 - heads draft
        text: Tensor,
        generator: torch.Generator,
    ) -> MedusaHeads:
        """Heads trained on this text (Medusa-1: the target is left as it is), and the tree that suits them.

        Args:
            target: what the heads sit on.
            draft: not used.
            text: `[time]` tokens, more than 64 and the heads.
            generator: source of batches, on the CPU.

        Raises:
            ValueError: too short a text, or tokens that the target does not have.
        """
        check_text(target, text)
        made, window = MedusaHeads(target, self.heads), LENGTH + self.heads
        batches = windows(text.to(target.embedding.weight.device), BATCH, window, generator)
        train_heads(made, target, batches, self.steps)
        hits = torch.stack([made.hits(target, next(batches)) for _ in range(MEASURED)]).mean(dim=0)
        made.paths = likeliest_paths(hits, self.nodes)
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
            target: the model that checks.
            tokens: `[batch, time]`, the prompts, padded at the left.
            n: new tokens, 1 or more.
            draft: what `prepare` made.
            temperature: 0 is greedy, and exact.
            generator: source of the draws, on the model's device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range; no heads, or those of another target.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        weight = target.embedding.weight
        if not isinstance(draft, MedusaHeads) or draft.out.shape[1:] != weight.shape:
            raise ValueError(
                f"draft={type(draft).__name__} must be heads for a target of {tuple(weight.shape)}: pass what `prepare` made"
            )
        rule: TreeRule = partial(follow, choose=partial(choose, target, temperature=temperature, generator=generator))
        if temperature > 0 and self.acceptance == "typical":
            rule = partial(_typical, target=target, temperature=temperature, epsilon=self.epsilon)
        return grow_and_verify(target, tokens, n, _Heads(draft, tokens), rule, stop=stop, padding=padding)


class _Heads:
    """Guesses of the heads, from the last hidden state that stood; a call is one of all heads."""

    def __init__(self, heads: MedusaHeads, tokens: Tensor) -> None:
        paths = sorted(heads.paths, key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(paths, start=1)}
        device = tokens.device
        self.tree = Tree.of([-1, *(index[path[:-1]] if path[:-1] else 0 for path in paths)], device)
        self.which = torch.tensor([[len(path) - 1, path[-1]] for path in paths], device=device).T  # head, guess
        self.heads, self.hidden, self.calls = heads, tokens.new_zeros(0, dtype=torch.float32), 0

    def propose(self, rows: Rows) -> Guesses:
        """The tree behind each row's last token; before the prompt is read, that token alone."""
        last = rows.last(1)
        if len(self.hidden) == 0:
            return Guesses(Tree.of([-1], last.device), last, torch.zeros_like(last, dtype=torch.bool))
        self.calls += 1
        logits = self.heads(self.hidden)
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [b, heads, i]
        tokens = torch.cat((last, best[:, self.which[0], self.which[1]]), dim=1)
        open_ = torch.ones_like(tokens, dtype=torch.bool)
        open_[:, 0] = False
        return Guesses(self.tree, tokens, open_)

    def learn(self, rows: Rows, guesses: Guesses, hidden: Tensor, path: Tensor, kept: Tensor) -> None:  # noqa: ARG002
        """Keep the hidden state of the last token that stood: what follows it is the next round's root."""
        self.hidden = hidden[torch.arange(len(path), device=path.device), path.gather(1, kept[:, None]).squeeze(1)]


def typical(p: Tensor, epsilon: float) -> Tensor:
    r"""What a probability must exceed to be plausible, $\min(\epsilon, \sqrt\epsilon\,e^{-H(p)})$: `[..., vocabulary]` to `[...]`.

    As in the official code the entropy's logarithm is of $p + 10^{-5}$.

    Examples:
        >>> p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
        >>> [round(x, 3) for x in typical(p, 0.09).tolist()]  # 0.3 / 4 where four are equally likely
        [0.09, 0.075]
    """
    entropy = -(p * (p + 1e-5).log()).sum(dim=-1)
    return (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)


def _typical(
    guesses: Guesses, hidden: Tensor, *, target: Decoder, temperature: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule of typical acceptance: of the longest branches that are plausible all along the likeliest, then the likeliest token."""
    tree, row = guesses.tree, torch.arange(len(hidden), device=hidden.device)
    logits = target.logits(hidden)
    p = probabilities(logits, temperature)
    parents = tree.parents.clamp(min=0)
    chance = p[row[:, None], parents, guesses.tokens]
    plausible = (chance > typical(p, epsilon)[:, parents]) & guesses.open
    plausible[:, 0] = True
    stands = (plausible[:, None] | ~tree.sees).all(dim=2)  # [b, nodes]: all ancestors are plausible
    inside = chance.clamp(min=torch.finfo(p.dtype).tiny).log()
    inside[:, 0] = 0
    likelihood = inside @ tree.sees.T.to(p.dtype)
    kept = (stands * tree.depths).amax(dim=1)
    best = likelihood.masked_fill(~stands | (tree.depths != kept[:, None]), float("-inf")).argmax(dim=1)
    longest = int(tree.depths.max())
    path = [best]
    for _ in range(longest):
        path.append(tree.parents[path[-1]].clamp(min=0))
    back = torch.stack(path, dim=1)  # [b, longest + 1], from the end to the root
    forth = (kept[:, None] - torch.arange(longest + 1, device=kept.device)).clamp(min=0)
    return back.gather(1, forth), kept, logits[row, best].argmax(dim=-1)
