r"""Linear programs: the smallest value of a linear function over a polytope, by the simplex method.

Source: `flexgen` (arXiv 2303.06865), the section on policy search, solves its programs with a library; this is the textbook's
method (two phases, a dense tableau) with Bland's rule, which cannot run in circles.

Differs from the paper: none, the optimum is the same by whatever method.

Not here: sparse or large programs, integers, sensitivities.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
ZERO = 1e-9  # below it an entry counts as none; rows are scaled so that their largest is 1


class Infeasible(ValueError):
    """No point satisfies all constraints."""


class Unbounded(ValueError):
    """The function falls without end."""


def minimize(cost: ArrayLike, upper: tuple[ArrayLike, ArrayLike], equal: tuple[ArrayLike, ArrayLike]) -> Array:
    r"""A vertex x with the least $c^\top x$ among those with $A x \le b$, $E x = f$ and $x \ge 0$.

    Args:
        cost: c, `[n]`.
        upper: A, `[rows, n]`, and b, `[rows]`; there may be no row.
        equal: E and f, alike.

    Returns:
        `[n]`; of several that are equally good, one.

    Raises:
        Infeasible: there is no such x.
        Unbounded: there is always a better one.
        ValueError: shapes do not fit, or a number is not finite.

    Examples:
        >>> minimize([-1, -2], ([[1, 1], [0, 1]], [3, 2]), ([[]], [])).tolist()  # x + y <= 3, y <= 2
        [1.0, 2.0]
    """
    c = np.asarray(cost, dtype=np.float64)
    (a, b), (e, f) = (_rows(given, len(c)) for given in (upper, equal))
    if not all(np.isfinite(x).all() for x in (c, a, b, e, f)):
        raise ValueError("a linear program's numbers must be finite")
    n, slacks = len(c), len(b)
    matrix, right = np.concatenate((a, e)), np.concatenate((b, f))
    scale = np.abs(matrix).max(axis=1, initial=0.0)
    scale = np.where(scale > 0, scale, 1.0)
    sign = np.where(right < 0, -1.0, 1.0)  # right sides from 0 on
    right = sign * right / scale
    matrix = sign[:, None] * np.concatenate((matrix / scale[:, None], np.eye(len(right), slacks)), axis=1)
    rows, columns = matrix.shape
    # phase 1: an artificial variable in each row, of which nothing may remain
    table = np.block([[matrix, np.eye(rows), right[:, None]]])
    basis = list(range(columns, columns + rows))
    start = np.concatenate((np.zeros(columns), np.ones(rows)))
    if _descend(table, basis, start, columns + rows) > ZERO * max(1.0, float(right.max(initial=0.0))):
        raise Infeasible("no point satisfies all constraints")
    for row in range(rows - 1, -1, -1):
        if basis[row] >= columns:
            found = np.flatnonzero(np.abs(table[row, :columns]) > ZERO)
            if len(found):
                _pivot(table, basis, row, int(found[0]))
            else:  # the row says what others say
                table = np.delete(table, row, axis=0)
                del basis[row]
    table = np.delete(table, np.s_[columns : columns + rows], axis=1)
    size = np.abs(c).max(initial=0.0) or 1.0
    _descend(table, basis, np.concatenate((c / size, np.zeros(slacks))), columns)
    x = np.zeros(columns)
    x[basis] = table[:, -1].clip(min=0)
    return x[:n]


def _descend(table: Array, basis: list[int], cost: Array, columns: int) -> float:
    """Go from vertex to vertex, in place, while one is better; the value at the last."""
    while True:
        reduced = cost - cost[basis] @ table[:, :-1]
        better = np.flatnonzero(reduced[:columns] < -ZERO)
        if not len(better):
            return float(cost[basis] @ table[:, -1])
        entering = int(better[0])  # Bland: the first
        able = np.flatnonzero(table[:, entering] > ZERO)
        if not len(able):
            raise Unbounded("the function falls without end")
        ratios = table[able, -1] / table[able, entering]
        ties = able[ratios <= ratios.min() + ZERO * max(1.0, abs(float(ratios.min())))]
        _pivot(table, basis, int(min(ties, key=lambda row: basis[row])), entering)


def _pivot(table: Array, basis: list[int], row: int, column: int) -> None:
    """Make a variable basic in a row, in place."""
    table[row] /= table[row, column]
    others = np.arange(len(table)) != row
    table[others] -= np.outer(table[others, column], table[row])
    basis[row] = column


def _rows(given: tuple[ArrayLike, ArrayLike], n: int) -> tuple[Array, Array]:
    matrix, right = (np.asarray(x, dtype=np.float64) for x in given)
    if matrix.size == 0 and right.size == 0:
        return np.zeros((0, n)), np.zeros(0)
    if right.ndim != 1 or matrix.shape != (len(right), n):
        raise ValueError(f"constraints of shape {matrix.shape} and {right.shape} must be [rows, {n}] and [rows]")
    return matrix, right
