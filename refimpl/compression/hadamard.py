r"""Hadamard rotations of any size, in O(n log n) where the size allows it.

A Hadamard matrix has entries $\pm 1$ and orthogonal rows; divided by $\sqrt n$ it is orthogonal, and spreads a vector evenly: what stood
in one coordinate stands in all, $\sqrt n$ times smaller. Beside 1 and 2 its order is a multiple of 4. Here it is a Kronecker product
$B \otimes S$ of a base and a power of two: S is Sylvester's, applied by butterflies; B is the smallest that Paley's two
constructions give for the size, up to order 1024. Where they give none (7, 30, 33 …), B is a random orthogonal matrix of the size's odd
part, drawn from the size alone: it mixes too, though its entries differ in size.

Source: R. Paley, On orthogonal matrices, 1933, for both constructions; the product with a power of two as in `quarot` (arXiv
2404.00456), Section 3 and its official code spcl/QuaRot@5008669b08c1f11f9b64d52d16fddd47ca754c5a, fake_quant/hadamard_utils.py.

Differs from the paper: bases are computed, not tabled, so that some have another order than there (344 instead of 172 for a size of
11008) and no size is refused.

Not here: kernels.

Examples:
    >>> turned = turn(torch.eye(4)[0])
    >>> turned.tolist(), turn(turned, back=True).tolist()
    ([0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0])
"""

import itertools
import math
from functools import cache

import torch
from torch import Tensor

LARGEST = 1024  # order of a base


def turn(x: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the last dimension, $x H$; computed in float32 or above, in x's dtype afterwards.

    Args:
        x: `[..., n]`, n at least 1.
        back: undo it, $x H^T$.

    Returns:
        Of x's shape.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    n = x.shape[-1]
    base = _base(n).to(x.device, wide.dtype)
    grid = torch.unflatten(wide, -1, (len(base), -1))  # [..., base, power of two]
    turned = _butterflies((base if back else base.T) @ grid if len(base) > 1 else grid)
    return turned.flatten(-2).to(x.dtype)


def turn_across(x: Tensor, over: int, *, back: bool = False) -> Tensor:
    """`turn` of `over` neighbouring parts into each other, channel by channel: rotates heads, not what is inside of them.

    Args:
        x: `[..., n]`.
        over: parts that the last dimension is cut into, which divides n; n itself turns all channels, and 1 none.
        back: undo it.
    """
    if over == 1:
        return x
    parts = torch.unflatten(x, -1, (over, -1)).transpose(-1, -2)
    return turn(parts, back=back).transpose(-1, -2).flatten(-2)


def is_hadamard(n: int) -> bool:
    """Whether the rotation of this size is a Hadamard matrix, with all entries alike.

    Examples:
        >>> [n for n in range(1, 45) if is_hadamard(n)]
        [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44]
    """
    return _order(n) is not None


def _butterflies(x: Tensor) -> Tensor:
    """The normalized Walsh–Hadamard transform of the last dimension, a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        a, b = torch.unflatten(x, -1, (-1, 2, half)).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(size)


@cache
def _base(n: int) -> Tensor:
    """The factor of the rotation that is no power of two, `[order, order]`, orthogonal, float64."""
    order = _order(n)
    if order is None:
        odd = n // (n & -n)
        drawn = torch.randn(odd, odd, generator=torch.Generator().manual_seed(odd), dtype=torch.float64)
        orthogonal: Tensor = torch.linalg.qr(drawn).Q
        return orthogonal
    return _paley(order) / math.sqrt(order)


def _order(n: int) -> int | None:
    """Order of the smallest base of a Hadamard matrix of size n; None where there is none here."""
    order = n // (n & -n)
    while order <= min(n, LARGEST):
        if n % order == 0 and (order == 1 or _field_of(order) is not None):
            return order
        order *= 2
    return None


def _field_of(order: int) -> tuple[int, int] | None:
    """Prime and exponent of the field that Paley's construction takes: of order - 1 elements, else of order / 2 - 1."""
    if order % 4:
        return None
    first, second = _prime_power(order - 1), _prime_power(order // 2 - 1)
    return first or (second if (order // 2 - 1) % 4 == 1 else None)


def _prime_power(q: int) -> tuple[int, int] | None:
    prime = next((p for p in range(2, math.isqrt(max(q, 0)) + 1) if q % p == 0), q)
    exponent = 1
    while q > 1 and prime**exponent < q:
        exponent += 1
    return (prime, exponent) if q > 1 and prime**exponent == q else None


def _paley(order: int) -> Tensor:
    r"""A Hadamard matrix, entries $\pm 1$, float64.

    With $\chi$ the quadratic character of a field of q elements and $Q_{ab} = \chi(a - b)$, bordered by ones to C of order q + 1:
    $I + C$ where q is 3 modulo 4, and $C \otimes \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix} + I \otimes \begin{pmatrix} 1 & -1
    \\ -1 & -1 \end{pmatrix}$ where it is 1.
    """
    field = _field_of(order)
    if field is None:
        return torch.ones(1, 1, dtype=torch.float64)
    prime, exponent = field
    q = prime**exponent
    digits = torch.tensor(list(itertools.product(range(prime), repeat=exponent)))  # [q, exponent]
    places = prime ** torch.arange(exponent - 1, -1, -1)
    difference = ((digits[:, None] - digits[None]) % prime * places).sum(-1)
    border = torch.ones(q + 1, q + 1, dtype=torch.float64)
    border[0, 0] = 0
    border[1:, 1:] = _character(prime, exponent)[difference]
    unit = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        border[1:, 0] = -1
        return unit + border
    swing = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, swing) + torch.kron(unit, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))


def _character(prime: int, exponent: int) -> Tensor:
    """1 for squares, -1 for the others, 0 for 0, of the field's elements as numbers in base `prime`: `[q]`, float64.

    Powers of an element x that runs through all but 0: `lowest` says what its power of the exponent is in lower ones.
    """
    q = prime**exponent
    for lowest in itertools.product(range(prime), repeat=exponent):
        one = power = (1, *[0] * (exponent - 1))  # coefficients of 1, x, x^2, ...
        powers = []
        for _ in range(q - 1):
            powers.append(power)
            carried = power[-1]
            power = tuple((a + carried * b) % prime for a, b in zip((0, *power[:-1]), lowest, strict=True))
            if power == one:
                break
        if len(powers) == q - 1 and power == one:
            places = [prime**i for i in range(exponent - 1, -1, -1)]
            character = torch.zeros(q, dtype=torch.float64)
            for i, element in enumerate(powers):
                character[sum(a * b for a, b in zip(element, places, strict=True))] = 1 if i % 2 == 0 else -1
            return character
    raise AssertionError(f"the field of {q} elements has a primitive element")
