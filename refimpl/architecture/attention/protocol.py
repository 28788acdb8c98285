r"""What all attention methods share.

Glossary
    q           queries $Q$, `[batch, heads, time, dim]`
    k           keys $K$, `[batch, kv_heads, time, dim]`
    v           values $V$, `[batch, kv_heads, time, value_dim]`
    kv_heads    divides heads; query head h reads key head h // (heads / kv_heads), as in grouped-query attention
    causal      position i reads positions 0 to i; otherwise it reads all of them

A method is a configuration that is called as `scaled_dot_product_attention` is:

Examples:
    >>> import torch
    >>> q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 3)
    >>> Softmax()(q, k, v, causal=True).shape
    torch.Size([1, 4, 5, 3])

Invariants, run for every method by `tests/architecture/attention/test_protocol.py`: outputs are `[batch, heads, time,
value_dim]` in the values' dtype; a causal output does not change with later keys and values; a batch equals its rows one
by one; grouped heads equal repeated ones; lengths of 1 and odd ones work; inputs are not written; the same call gives the
same result; gradients reach q, k and v.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


class Attention(ABC):
    """A method: a frozen dataclass of settings that is called on queries, keys and values."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        """Attend, `[batch, heads, time, value_dim]`.

        Raises:
            ValueError: shapes do not fit (`check_shapes`).
            NotImplementedError: the method is not defined for this `causal`.
        """

    def state_bytes(self, k: Tensor, v: Tensor) -> int:
        """Bytes that a decoder holds after these keys and values: all of them, unless the method needs less."""
        return k.nbytes + v.nbytes


@dataclass(frozen=True)
class Softmax(Attention):
    r"""Exact attention, $\operatorname{softmax}(QK^\top/\sqrt{dim})V$, by PyTorch's kernels: what others are held against."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        """Attend, `[batch, heads, time, value_dim]`."""
        check_shapes(q, k, v, causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Check that queries, keys and values fit together.

    Raises:
        ValueError: they do not.

    Examples:
        >>> import torch
        >>> check_shapes(torch.ones(1, 3, 5, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), causal=True)
        Traceback (most recent call last):
        ValueError: 3 query heads are no multiple of 2 key heads
    """
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must be [batch, heads, time, dim], none of them 0")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention takes as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
