r"""ALiBi: no position vectors; a penalty on every score that grows with the distance, steeper in some heads than in others.

Source: `alibi` (arXiv 2108.12409), Section 3; official code
ofirpress/attention_with_linear_biases@4b92f28a005ead2567abe2359f633e73e08f3833, fairseq/models/transformer.py.

Differs from the paper: none; the official code adds $m_h\,j$ to a whole row where the paper subtracts $m_h\,(i-j)$, which
the softmax cannot tell apart; here it is the paper's form, whose numbers are small where weights are large.

Not here: keys after the query (encoders); learned slopes, which the paper tried and left.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refimpl.architecture.long_context.positions.protocol import Positions, distances
from refimpl.model.config import Config
from refimpl.model.step import ScoreBias


@dataclass(frozen=True, kw_only=True)
class ALiBi(Positions):
    r"""Attention with linear biases, $\operatorname{softmax}_j(q_i^\top k_j / \sqrt d - m_h\,(i - j))$, and no rotation.

    A model in half precision adds the bias in its own dtype: in bfloat16 one distance in two is told apart beyond 256.

    Args:
        max_exponent: the flattest of $n$ slopes is $2^{-\mathrm{max\_exponent}}$, for $n$ a power of two; the paper's 8.

    Examples:
        >>> bias = ALiBi().score_bias(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8))
        >>> bias(torch.tensor([2]).view(1, 1, 1, 1), torch.tensor([0, 1, 2]).view(1, 1, 1, 3)).flatten(0, 2).tolist()
        [[-0.125, -0.0625, -0.0], [-0.0078125, -0.00390625, -0.0]]
    """

    relative: ClassVar[bool] = True

    max_exponent: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.max_exponent < float("inf"):
            raise ValueError(f"max_exponent={self.max_exponent} must be above 0; the paper's is 8")

    def score_bias(self, config: Config, generator: torch.Generator | None = None) -> ScoreBias:  # noqa: ARG002
        """The penalty as a decoder adds it, `[batch or 1, heads, time, kept]`, float32; nothing is drawn."""
        return LinearBias(slopes(config.n_heads, self.max_exponent))


class LinearBias:
    """The penalty for given slopes.

    Args:
        slopes: `[heads]`, $m_h$.
    """

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """From positions `[batch or 1, 1, time, 1]` and `[batch or 1, 1 or kv_heads, 1, kept]`: `[..., heads, time, kept]`."""
        m = self.slopes.to(queries.device).view(-1, 1, 1)
        return -m * distances(queries, keys, len(m))


def slopes(n_heads: int, max_exponent: float = 8.0) -> Tensor:
    r"""The slopes $m_h = 2^{-8h/n}$, $h = 1, \dots, n$ (Section 3).

    For other n than powers of two, as in the official code: those of the next lower power, then every second one of the
    next higher power, from the steepest on, until there are n.

    Args:
        n_heads: $n$, 1 or more.
        max_exponent: the 8.

    Returns:
        `[n_heads]`, float32, positive.

    Raises:
        ValueError: no heads.

    Examples:
        >>> slopes(4).tolist(), slopes(3).tolist()
        ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    if n_heads < 1:
        raise ValueError(f"n_heads={n_heads} must be at least 1")
    power = 2 ** (n_heads.bit_length() - 1)
    exact = torch.arange(1, power + 1) / power
    between = torch.arange(1, 2 * power + 1, 2) / (2 * power)
    return torch.exp2(-max_exponent * torch.cat((exact, between[: n_heads - power])))


def alibi_mask(n_heads: int, time: int, kept: int, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Bias and causal mask in one, as `torch.nn.functional.scaled_dot_product_attention` takes it in `attn_mask`.

    Args:
        n_heads: query heads.
        time: queries, the last of the tokens.
        kept: keys, all tokens; at least as many.
        dtype: of the queries.

    Returns:
        `[1, n_heads, time, kept]`: $-m_h\,(i - j)$ for $j \le i$, minus infinity for the future.

    Raises:
        ValueError: more queries than keys, or none.

    Examples:
        >>> alibi_mask(1, 2, 3)[0, 0].tolist()
        [[-0.00390625, -0.0, -inf], [-0.0078125, -0.00390625, -0.0]]
    """
    if not 1 <= time <= kept:
        raise ValueError(f"time={time} must be from 1 to kept={kept}: queries are the last of the tokens")
    apart = torch.arange(kept - time, kept).view(-1, 1) - torch.arange(kept)
    bias = -slopes(n_heads).view(-1, 1, 1) * apart
    return bias.masked_fill(apart < 0, float("-inf")).to(dtype).unsqueeze(0)
