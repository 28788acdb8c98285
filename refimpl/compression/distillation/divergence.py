r"""Divergences of two next-token distributions from their logarithms: the Kullback-Leibler one, and mixtures to take it of.

Source: none, textbook definitions.

Differs from the textbook: `kl` takes 0 log 0 as 0 where the first distribution rules a token out.

Not here: temperatures (divide the logits); means over positions (`protocol.counted` says which count).
"""

import math

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""$\mathrm{KL}(p \,\|\, q) = \sum_i p_i (\log p_i - \log q_i)$; the gradient reaches both.

    Args:
        log_p: `[..., vocabulary]`, log-probabilities; minus infinity rules a token out.
        log_q: the same shape.

    Returns:
        `[...]`, in nats; infinite where q rules out what p does not.

    Examples:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> kl(torch.tensor([1.0, 0.0]).log(), half).exp().item(), kl(half, torch.tensor([1.0, 0.0]).log()).item()
        (2.0, inf)
    """
    p = log_p.exp()
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    needed = log_q.masked_fill(p == 0, 0)  # what p rules out counts nothing, even where q rules it out too
    divergence: Tensor = torch.linalg.vecdot(p, finite) - torch.linalg.vecdot(p, needed)
    return divergence


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    r"""$\log(s\,p + (1 - s)\,q)$ with share $s$ of the first, in log space throughout: tiny chances stay exact.

    Args:
        log_p: `[..., vocabulary]`, log-probabilities.
        log_q: the same shape.
        share: of p, 0 (q itself) to 1 (p itself).

    Returns:
        The same shape.

    Examples:
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> log_mixture(p.log(), q.log(), 0.5).exp().tolist()
        [0.75, 0.25]
    """
    if share in (0, 1):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))
