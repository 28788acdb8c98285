r"""Linear attention: a kernel in the place of the softmax, so that the past fits in a state of constant size.

Source: `linear-transformer` (arXiv 2006.16236), Eqs. (4)-(12) and (16)-(20); official code
idiap/fast-transformers@2ad36b97e64cb93862937bd21fcc9568d989561f, fast_transformers/attention/causal_linear_attention.py.

Differs from the paper: `eps` is added to the denominator, as in the official code; sums are float32 at least.

Not here: key padding (zero the features of padded keys); the hand-written gradient of Eqs. (13)-(15), since autograd
through the chunked form keeps one state a chunk, and so needs memory linear in time as well.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.architecture.attention.protocol import Attention, check_shapes


class State(NamedTuple):
    r"""The past of a causal layer: all that a decoder keeps of it.

    Attributes:
        S: `[batch, kv_heads, dim, value_dim]`, attention memory $\sum_j \phi(K_j) V_j^\top$ (Eq. 10).
        z: `[batch, kv_heads, dim]`, normalizer memory $\sum_j \phi(K_j)$ (Eq. 11).
    """

    S: Tensor
    z: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.S.nbytes + self.z.nbytes


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Attention):
    r"""Attention with the similarity $\phi(q)^\top \phi(k)$, $\phi(x) = \operatorname{elu}(x) + 1$ (Eq. 7).

    Args:
        eps: added to the denominator; the official code's default.
        chunk: positions whose similarities are formed at once; any gives the same result. Ours.

    Examples:
        >>> attend, x = LinearAttention(), torch.zeros(1, 1, 3, 1)
        >>> attend(x, x, torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 3, 1)).flatten().round(decimals=4).tolist()
        [0.0, 0.5, 2.0]
    """

    eps: float = 1e-6
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps={self.eps} must not be negative")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        """Attend, `[batch, heads, time, value_dim]`, in the values' dtype.

        Raises:
            ValueError: shapes do not fit.
        """
        return linear_attention_chunked(
            elu_plus_one(q), elu_plus_one(k), v, causal=causal, eps=self.eps, chunk=self.chunk
        )[0]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attend to the past that `state` holds and, causally, to one or more new positions.

        Returns:
            Outputs `[batch, heads, time, value_dim]`, and the state with the new positions in it; `state` is unchanged.

        Raises:
            ValueError: shapes do not fit.
        """
        q, k = elu_plus_one(q), elu_plus_one(k)
        if q.shape[2] == 1:
            return linear_attention_recurrent(q, k, v, eps=self.eps, state=state)
        return linear_attention_chunked(q, k, v, eps=self.eps, state=state, chunk=self.chunk)

    def state_bytes(self, k: Tensor, v: Tensor) -> int:
        """Bytes that a decoder holds after these keys and values."""
        return self.decode(k, k, v)[1].nbytes


def elu_plus_one(x: Tensor) -> Tensor:
    r"""Features $\phi(x) = \operatorname{elu}(x) + 1$ (Eq. 7): positive, of x's shape, float32 at least.

    Examples:
        >>> elu_plus_one(torch.tensor([0.0, 2.0])).tolist()
        [1.0, 3.0]
    """
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def linear_attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, eps: float = 1e-6, state: State | None = None
) -> tuple[Tensor, State]:
    r"""All similarities at once, Eqs. (8) and (6): $O(time^2)$ if causal, for short inputs and as a reference.

    All forms share these arguments and agree to rounding.

    Args:
        q: `[batch, heads, time, dim]`, features $\phi(Q)$; a variant brings its own $\phi$.
        k: `[batch, kv_heads, time, dim]`, features $\phi(K)$.
        v: `[batch, kv_heads, time, value_dim]`.
        causal: position i reads 0 to i; otherwise every position reads all.
        eps: added to the denominator.
        state: the past before these positions; None is the empty one.

    Returns:
        Outputs `[batch, heads, time, value_dim]` in v's dtype, and the state after these positions.

    Raises:
        ValueError: shapes do not fit.

    Examples:
        >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> out, state = linear_attention_parallel(q, k, torch.tensor([2.0, 6.0]).view(1, 1, 2, 1), eps=0.0)
        >>> out.flatten().tolist(), state.S.item(), state.z.item()  # (1 * 2 + 3 * 6) / (1 + 3) = 5
        ([2.0, 5.0], 20.0, 4.0)
    """
    query, key, value, before = _prepare(q, k, v, causal, state)
    after = before + key.mT @ value
    sums = (query @ key.mT).tril() @ value + query @ before if causal else query @ after
    return _finish(sums, after, eps, v)


def linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, eps: float = 1e-6, state: State | None = None
) -> tuple[Tensor, State]:
    """One position after the other, Eqs. (16)-(20): what a decoder does. Arguments and results of `_parallel`."""
    query, key, value, memory = _prepare(q, k, v, causal, state)
    sums = []
    for i in range(k.shape[2]):
        memory = memory + key[..., i, :, None] * value[..., i, None, :]
        sums.append(query[..., i : i + 1, :] @ memory if causal else memory)
    return _finish(torch.cat(sums, dim=-2) if causal else query @ memory, memory, eps, v)


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    eps: float = 1e-6,
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """Parallel inside chunks of `chunk` positions, a state between them: linear in time, and the fast form.

    Arguments and results of `_parallel`.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if not causal:
        return linear_attention_parallel(q, k, v, causal=False, eps=eps, state=state)
    query, key, value, memory = _prepare(q, k, v, causal, state)
    query, key, value = (_chunks(x, chunk) for x in (query, key, value))
    memories = torch.cat((memory.unsqueeze(-3), key.mT @ value), dim=-3).cumsum(dim=-3)  # before each chunk, after all
    sums = (query @ key.mT).tril() @ value + query @ memories[..., :-1, :, :]
    return _finish(sums.flatten(-3, -2)[..., : q.shape[2], :], memories[..., -1, :, :], eps, v)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, state: State | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the dtype of the sums, by groups of the query heads that share a key head.

    A column of ones stands beside the values, so that each sum over them carries its denominator (S carries z).

    Returns:
        query `[batch, kv_heads, group, time, dim]`, key `[…, 1, time, dim]`, value `[…, 1, time, value_dim + 1]` and
        memory `[…, 1, dim, value_dim + 1]`.
    """
    check_shapes(q, k, v, causal)
    batch, heads, _, dim = k.shape
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    query = q.to(dtype).reshape(batch, heads, -1, *q.shape[2:])
    key, value = k.to(dtype).unsqueeze(2), F.pad(v.to(dtype), (0, 1), value=1.0).unsqueeze(2)
    if state is None:
        return query, key, value, value.new_zeros(batch, heads, 1, dim, value.shape[-1])
    if state.S.shape != (batch, heads, dim, v.shape[3]) or state.z.shape != state.S.shape[:3]:
        raise ValueError(f"state of {tuple(state.S.shape)} and {tuple(state.z.shape)} is not of these keys and values")
    return query, key, value, torch.cat((state.S, state.z.unsqueeze(-1)), dim=-1).to(dtype).unsqueeze(2)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """`[…, time, dim]` to `[…, chunks, chunk, dim]`; what is missing in the last chunk is zero, and so adds nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % chunk)).reshape(*x.shape[:-2], -1, chunk, x.shape[-1])


def _finish(sums: Tensor, memory: Tensor, eps: float, v: Tensor) -> tuple[Tensor, State]:
    """Divide the sums by the denominator that is their last column (Eq. 12), and undo `_prepare`."""
    out = sums[..., :-1] / (sums[..., -1:] + eps)
    return out.flatten(1, 2).to(v.dtype), State(memory[:, :, 0, :, :-1], memory[:, :, 0, :, -1])
