r"""Heads that guess from the target's last hidden state, how they are trained, and which of their guesses make the best tree.

Source: `medusa` (arXiv 2401.10774), the sections on Medusa heads, Medusa-1 and the construction of trees; official code
FasterDecoding/Medusa@e2a5d20: medusa/model/medusa_model.py, medusa/train/train_legacy.py, medusa/eval/gen_results.py
(`explore_graph`).

Differs from the paper: none. The code for training does, in three things: its heads have a bias, they share the target's output matrix,
which is not trained, and they all weigh alike in the loss.

Not here: Medusa-2, which trains the target with the heads; more layers in a head.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.model.cache import Cache
from refimpl.model.model import Decoder
from refimpl.model.train import train

TOP = 10  # guesses of a head that a tree may use
DECAY = 0.8  # of a head's weight in the loss, for each token further ahead
RATE, WARMUP = 1e-3, 0.1  # of learning; share of steps


class MedusaHeads(nn.Module):
    r"""Head k says what stands k + 1 tokens on: $W_2^{(k)}(\operatorname{SiLU}(W_1^{(k)} h) + h)$.

    Each begins as the target's own output layer: $W_1$ is 0, and $W_2$ a copy.

    Args:
        target: the decoder.
        heads: how many.

    Attributes:
        paths: the tree: of each node, which guess of each head leads to it. At first the chain of their best.

    Examples:
        >>> from refimpl.model.config import Config
        >>> target = Decoder(Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8))
        >>> heads = MedusaHeads(target, 3)
        >>> heads(torch.zeros(2, 7, 8)).shape, heads.paths
        (torch.Size([2, 7, 3, 5]), [(0,), (0, 0), (0, 0, 0)])
    """

    def __init__(self, target: Decoder, heads: int) -> None:
        super().__init__()
        output = target.embedding if target.lm_head is None else target.lm_head
        weight = output.weight.detach()
        self.inner = nn.Parameter(weight.new_zeros(heads, weight.shape[1], weight.shape[1]))
        self.out = nn.Parameter(weight.expand(heads, -1, -1).clone())
        self.paths: list[tuple[int, ...]] = [(0,) * (depth + 1) for depth in range(heads)]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[..., heads, vocabulary]` from hidden states `[..., d_model]`."""
        inner = F.silu(torch.einsum("...d,ked->...ke", hidden, self.inner)) + hidden.unsqueeze(-2)
        return torch.einsum("...ke,kve->...kv", inner, self.out)

    def as_decoder(self, target: Decoder) -> Callable[[Tensor, Cache], Tensor]:
        """Tokens and a cache to logits, with embeddings for hidden states: what a call takes, for those who time it."""
        return lambda tokens, _: self(target.embedding(tokens))

    @torch.no_grad()
    def hits(self, target: Decoder, batch: Tensor) -> Tensor:
        """How often each head's i-th guess is right on text `[batch, time]`: `[heads, guesses]`."""
        heads = len(self.out)
        logits = self(target.hidden(batch[:, : -heads - 1]))
        guesses = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [b, t, k, i]
        return (guesses == ahead(batch, heads)[..., None]).double().mean(dim=(0, 1))  # type: ignore[no-any-return]


def train_heads(made: MedusaHeads, target: Decoder, batches: Iterable[Tensor], steps: int) -> list[float]:
    """Train heads in place, and return the loss of each step; the target stays as it is (Medusa-1).

    Args:
        made: heads of this target; without gradients from here on.
        target: what they sit on.
        batches: `[batch, time]` tokens, at least `steps` of them.
        steps: number of updates; AdamW, a cosine behind a tenth of warm-up.
    """
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE, weight_decay=0.0)
    losses = train(made, optimizer, batches, steps, loss=partial(_loss, target=target), schedule=_cosine)
    made.eval().requires_grad_(False)
    return losses


def likeliest_paths(hits: Tensor, nodes: int) -> list[tuple[int, ...]]:
    """The tree of the most expected guesses that stand: nodes are added one by one, each time the likeliest whose parent is there.

    Args:
        hits: `[heads, guesses]`, how often each head's i-th guess is right; heads are taken to be independent.
        nodes: how many; fewer if there are fewer combinations.

    Examples:
        >>> likeliest_paths(torch.tensor([[0.6, 0.2], [0.5, 0.1]]), 4)
        [(0,), (0, 0), (1,), (1, 0)]
    """
    heads, guesses = hits.shape
    chances: list[list[float]] = hits.tolist()

    def chance(path: tuple[int, ...]) -> float:
        return math.prod(chances[head][guess] for head, guess in enumerate(path))

    found: list[tuple[int, ...]] = []
    border: set[tuple[int, ...]] = {(0,)}
    while border and len(found) < nodes:
        path = max(border, key=lambda path: (chance(path), -len(path), path))
        border.remove(path)
        found.append(path)
        if path[-1] + 1 < guesses:
            border.add((*path[:-1], path[-1] + 1))
        if len(path) < heads:
            border.add((*path, 0))
    return found


def ahead(batch: Tensor, heads: int) -> Tensor:
    """What heads are to say of text `[batch, time]`, but for its end: `[batch, time - heads - 1, heads]`.

    Examples:
        >>> ahead(torch.arange(5)[None], 2).tolist()  # behind 0, the target itself says 1
        [[[2, 3], [3, 4]]]
    """
    return batch[:, 2:].unfold(1, heads, 1)


def _loss(made: nn.Module, batch: Tensor, *, target: Decoder) -> Tensor:
    """Cross-entropies of the heads, each further one's less by a factor of 0.8."""
    wanted = ahead(batch, len(made.out))  # type: ignore[arg-type]
    with torch.no_grad():
        hidden = target.hidden(batch[:, : wanted.shape[1]])
    logits = made(hidden).float()
    each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape).mean(dim=(0, 1))
    return (each * DECAY ** torch.arange(1, len(each) + 1, device=each.device)).sum()


def _cosine(done: float) -> float:
    if done < WARMUP:
        return done / WARMUP
    return (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2
