r"""How much faster guesses make decoding, from how many of them were accepted and from what calls cost.

Source: `speculative-decoding` (arXiv 2211.17192), Eq. (1), Definition 3.7 and Theorem 3.8; of trees `medusa` (arXiv 2401.10774),
the section on optimized trees (2.3.3), where each node adds the chance that all of its branch is accepted.

Differs from the paper, which has a number of guesses that is always the same, and a target that reads them for nothing (all ours):
rounds have guesses of their own number, and E is the mean over them, as E of their mean number would be too high (it is concave); a
call over several tokens costs what it is measured to cost; a batch shares its calls, of which a row that has ended gets nothing.

A tree of guesses has no single acceptance: a place has several guesses, fewer further down, and a branch may end where others go on.
There the chance of each depth is measured, that a guess stands at it where one did at each before, and E is the sum of their
products, 1 of the root included. With the same chance at each depth it is Eq. (1).

Not here: what a method does between calls; chances that depend on the text. Where the guesses of a chain stand or fall together, as
those that are copied do, one chance for all gives too high an E.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refimpl.inference.decoding.protocol import Decoded


def expected_tokens(alpha: float, gamma: float) -> float:
    r"""Tokens a target call, $E = (1 - \alpha^{\gamma + 1}) / (1 - \alpha)$ (Eq. 1).

    Args:
        alpha: mean share of guesses that are accepted, 0 to 1, each independent of the others.
        gamma: guesses of the round.

    Examples:
        >>> round(expected_tokens(0.8, 5), 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
        (3.69, 5.0, 1.0)
    """
    return (1 - alpha ** (gamma + 1)) / (1 - alpha) if alpha < 1 else gamma + 1.0


def expected_speedup(tokens: float, gamma: float, cost: float, reading: float = 1.0) -> float:
    r"""Factor by which time shrinks, $E / (\gamma c + v)$: Theorem 3.8, where $v = 1$.

    Args:
        tokens: $E$, expected tokens of a target call.
        gamma: $\gamma$, draft calls for each target call.
        cost: $c$, time of a draft call over that of a target call, each over one token (Definition 3.7).
        reading: $v$, mean time of the target calls over that of one over one token; 1 if more tokens take no longer.

    Examples:
        >>> round(expected_speedup(expected_tokens(0.8, 5), 5, 0.02), 2)
        3.35
    """
    return tokens / (gamma * cost + reading)


def expected_tokens_of(runs: Sequence[Decoded]) -> float:
    r"""$E$ of what was decoded: tokens that a target call gives a row, by the measured acceptance and each round's guesses.

    Guesses are a tree where there are more of them than stand one behind another.

    Args:
        runs: of one method; acceptance is taken from all of them together. Where stop tokens cut off a tree's branch, it counts
            as refused.

    Examples:
        >>> from refimpl.inference.decoding.protocol import Plain
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder
        >>> config = Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> expected_tokens_of([Plain().decode(Decoder(config), torch.tensor([[1, 2]]), 3)])
        1.0
    """
    depths, stood = (torch.cat([getattr(run, name)[_going(run)] for run in runs]) for name in ("depths", "stood"))
    if any(bool((run.drafted > run.depths.sum(dim=1)).any()) for run in runs):
        by_depth = torch.cat((torch.ones(1, dtype=torch.float64), chances_by_depth(depths, stood).cumprod(0))).cumsum(0)
    else:
        judged = sum(int((run.accepted + run.rejected).sum()) for run in runs)
        alpha = int(stood.sum()) / max(judged, 1)
        by_depth = torch.tensor([expected_tokens(alpha, gamma) for gamma in range(int(depths.max()) + 1)]).double()
    return float(by_depth[depths].sum()) / sum(run.depths.numel() for run in runs)


def chances_by_depth(depths: Tensor, stood: Tensor) -> Tensor:
    """Of the rounds with a guess at a depth where all guesses before it stood, the share in which one stood there too.

    Args:
        depths: `[rounds]`, guesses one behind another.
        stood: `[rounds]`, of these, those that stand.

    Returns:
        `[deepest]`, 0 where no round got so far.

    Examples:
        >>> chances_by_depth(torch.tensor([2, 2, 1, 0]), torch.tensor([2, 0, 1, 0])).tolist()
        [0.6666666666666666, 1.0]
    """
    depth = torch.arange(1, int(depths.max()) + 1)
    tried = (depths[:, None] >= depth) & (stood[:, None] >= depth - 1)
    return (tried & (stood[:, None] >= depth)).sum(dim=0).double() / tried.sum(dim=0).clamp(min=1)


def _going(run: Decoded) -> Tensor:
    """Which calls were a row's rounds, `[batch, target_calls]`."""
    return torch.arange(run.depths.shape[1]) < run.rounds[:, None]
