"""Linear programs against all vertices, and the example that sends other rules round in circles."""

import itertools

import numpy as np
import pytest

from refimpl.inference.system_level.design.simplex import Infeasible, Unbounded, minimize

NONE = ([], [])


def by_vertices(cost, upper, equal):
    """The least value at any vertex: every choice of as many tight constraints as there are variables; None if there is none."""
    n, (a, b), (e, f) = len(cost), upper, equal
    tight = np.concatenate((np.array(a).reshape(-1, n), -np.eye(n)))
    limits = np.concatenate((np.array(b), np.zeros(n)))
    always = np.array(e).reshape(-1, n)
    best = None
    for rows in itertools.combinations(range(len(limits)), n - len(always)):
        matrix = np.concatenate((always, tight[list(rows)]))
        if abs(np.linalg.det(matrix)) < 1e-9:
            continue
        x = np.linalg.solve(matrix, np.concatenate((np.array(f), limits[list(rows)])))
        if (tight @ x <= limits + 1e-9).all() and (best is None or cost @ x < best):
            best = float(cost @ x)
    return best


def test_the_optimum_is_that_of_all_vertices():
    """Oracle: brute force over all vertices of 150 programs, bounded by a box, a third of them with an equation; some have no point."""
    random, empty = np.random.default_rng(0), 0
    for trial in range(150):
        n, m = int(random.integers(2, 5)), int(random.integers(1, 4))
        cost = random.normal(size=n).round(2)
        upper = (
            np.concatenate((random.normal(size=(m, n)).round(1), np.eye(n))),
            np.concatenate((random.normal(size=m).round(1), np.full(n, 2.0))),
        )
        equal = (random.normal(size=(1, n)).round(1), random.normal(size=1).round(1)) if trial % 3 == 0 else NONE
        expected = by_vertices(cost, upper, equal)
        if expected is None:
            empty += 1
            with pytest.raises(Infeasible):
                minimize(cost, upper, equal)
            continue
        x = minimize(cost, upper, equal)
        assert cost @ x == pytest.approx(expected, abs=1e-7)
        assert (x >= 0).all() and (upper[0] @ x <= upper[1] + 1e-7).all()
        if len(equal[1]):
            assert equal[0] @ x == pytest.approx(equal[1], abs=1e-7)
    assert 10 < empty < 100


def test_it_does_not_run_in_circles():
    """Oracle: Beale's example, on which the rule of the steepest descent cycles; its optimum is -1/20."""
    cost = [-0.75, 150, -0.02, 6]
    rows = [[0.25, -60, -0.04, 9], [0.5, -90, -0.02, 3], [0, 0, 1, 0]]
    assert np.dot(cost, minimize(cost, (rows, [0, 0, 1]), NONE)) == pytest.approx(-0.05)


def test_sizes_do_not_matter():
    """Oracle: by hand, x + y = 1 with y at most a tenth; rows in units of 1e12 and 1e-9."""
    x = minimize([1.0, 0.0], ([[0, 1e12], [0, 1e-9]], [1e11, 1.0]), ([[1e-9, 1e-9]], [1e-9]))
    assert x.tolist() == pytest.approx([0.9, 0.1])


def test_equations_that_say_the_same_are_one():
    """Oracle: by hand."""
    assert minimize([1, 2], NONE, ([[1, 1], [2, 2]], [1, 2])).tolist() == [1, 0]


def test_what_has_no_optimum_is_refused():
    with pytest.raises(Unbounded):
        minimize([-1, 0], ([[0, 1]], [1]), NONE)
    with pytest.raises(Infeasible):
        minimize([1, 1], ([[1, 1]], [1]), ([[1, 0]], [2]))
    with pytest.raises(ValueError, match="must be finite"):
        minimize([1], ([[float("inf")]], [1]), NONE)
    with pytest.raises(ValueError, match=r"must be \[rows, 2\]"):
        minimize([1, 1], ([[1, 1, 1]], [1]), NONE)
