r"""Gates that are 0 or 1 with a probability that can be trained: the hard concrete distribution.

A number between 0 and 1 is drawn from a smooth distribution, stretched to $(\gamma, \zeta)$, which is a little more, and clipped:

$$s = \sigma\left(\frac{\log u - \log(1 - u) + \log\alpha}{\beta}\right), \qquad z = \min(1, \max(0, s(\zeta - \gamma) + \gamma))$$

with u uniform in (0, 1). Then $z = 0$ and $z = 1$ each have a probability above zero, and between them the derivative with respect
to $\log\alpha$ is that of s.

Source: Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization" (arXiv 1712.01312), Section 2.2, as
`sheared-llama` (arXiv 2310.06694), Section 2.1, uses it; official code
princeton-nlp/LLM-Shearing@b87218b566c73f6b246aaad3e4c42883f65a48a6, llmshearing/models/l0_module.py.

Differs from the paper: none.

Examples:
    >>> log_alpha = torch.tensor([-4.6, 0.0, 4.6])
    >>> probability_of_zero(log_alpha).mul(1000).round().tolist()
    [953.0, 168.0, 2.0]
    >>> settled(log_alpha, n_open=2).mul(1000).round().tolist()
    [0.0, 500.0, 996.0]
"""

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
EPSILON = 1e-6  # of the noise, and of probabilities
LIMIT = math.log(100.0)  # of log alpha, either way
SETTLED = 0.8  # what log alpha / beta is multiplied by where nothing is drawn


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    r"""Gates z, as above.

    Args:
        log_alpha: $\log\alpha$, any shape.
        noise: u, of the same shape, 0 to 1.

    Returns:
        0 to 1, both ends included; differentiable with respect to `log_alpha`.

    Examples:
        >>> sample(torch.zeros(3), torch.tensor([0.1, 0.5, 0.9])).tolist()
        [0.0, 0.5, 1.0]
    """
    u = noise.clamp(EPSILON, 1 - EPSILON)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_of_zero(log_alpha: Tensor) -> Tensor:
    r"""$P(z = 0) = \sigma(\beta \log(-\gamma / \zeta) - \log\alpha)$, of the same shape; the rest is the expected $L_0$ norm."""
    return torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha).clamp(EPSILON, 1 - EPSILON)


def settled(log_alpha: Tensor, n_open: int | None = None) -> Tensor:
    r"""Gates without noise: $\sigma(0.8 \log\alpha / \beta)$, and 0 for those that close.

    Args:
        log_alpha: `[..., n]`.
        n_open: how many of each n stay open, those with the largest $\log\alpha$; None takes the number that is expected.

    Returns:
        `[..., n]`; the number of entries above zero is `n_open`.
    """
    gates = torch.sigmoid(log_alpha / BETA * SETTLED)
    n = log_alpha.shape[-1]
    rows = gates.view(-1, n).clone()
    for row, chances in zip(rows, probability_of_zero(log_alpha).view(-1, n), strict=True):
        closed = round(float(chances.sum())) if n_open is None else n - n_open
        row[row.argsort(stable=True)[:closed]] = 0.0
    return rows.view(gates.shape)
