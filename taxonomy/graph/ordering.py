"""Order within columns and heights that follow: the steps of Sugiyama's layered drawing, on cells that know their neighbours."""

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from itertools import groupby

from taxonomy.graph.layout import spaced

SWEEPS = 12


@dataclass(eq=False)
class Cell:
    """A box, or the place of edges that pass a column: `key` is a node, or (target, relation) for a way."""

    key: str | tuple[str, str]
    column: int
    lane: int
    rank: int
    height: float
    width: float = 0.0
    text: str = ""
    y: float = 0.0
    place: float = 0.0
    left: dict["Cell", None] = field(default_factory=dict)
    right: dict["Cell", None] = field(default_factory=dict)
    beside: dict["Cell", None] = field(default_factory=dict)


def crossings(columns: list[list[Cell]]) -> int:
    """How many pairs of edges between neighbouring columns cross: the inversions of where they end."""
    count = 0
    for column in columns:
        seen: list[float] = []
        for cell in column:
            ends = sorted(other.place for other in cell.right)
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def order(columns: list[list[Cell]]) -> None:
    """Sort each column so that few edges cross: barycenter sweeps from both ends, of which the best result is kept."""
    for column in columns:
        column.sort(key=lambda cell: (cell.lane, cell.rank))
        _number(column)
    best, fewest = [list(column) for column in columns], crossings(columns)
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = {cell: _centre(cell, sweep % 2 == 0) for cell in column}
            column.sort(key=lambda cell: (cell.lane, wanted[cell], cell.rank))
            _number(column)
        if (count := crossings(columns)) < fewest:
            best, fewest = [list(column) for column in columns], count
    for column, kept in zip(columns, best, strict=True):
        column[:] = kept


def _number(column: list[Cell]) -> None:
    for i, cell in enumerate(column):
        cell.place = (i + 0.5) / len(column)


def _centre(cell: Cell, rightwards: bool) -> float:
    """Mean place of what a cell is joined to on the side that the sweep comes from, and in its own column."""
    joined = [*(cell.left if rightwards else cell.right), *cell.beside]
    return sum(other.place for other in joined) / len(joined) if joined else cell.place


def settle(columns: list[list[Cell]], tops: list[tuple[float, float]]) -> None:
    """Give cells their heights: as near to what they are joined to as their order, their sizes and their lane allow."""
    runs = [list(run) for column in columns for _, run in groupby(column, key=lambda cell: cell.lane)]
    for run in runs:
        top, bottom = tops[run[0].lane]
        _stack(run, [(top + bottom) / 2] * len(run), top, bottom)
    for sweep in range(SWEEPS):
        for run in runs if sweep % 2 == 0 else reversed(runs):
            _stack(run, [_level(cell) for cell in run], *tops[run[0].lane])


def _level(cell: Cell) -> float:
    """Mean height of what a cell is joined to; ways hold on to each other, so that long edges bend near their ends."""
    joined = [*cell.left, *cell.right]
    weights = [(1, 2, 8)[(not cell.width) + (not other.width)] for other in joined]
    if not joined:
        return cell.y
    return sum(weight * other.y for weight, other in zip(weights, joined, strict=True)) / sum(weights)


def _stack(run: list[Cell], wanted: list[float], top: float, bottom: float) -> None:
    for cell, y in zip(run, spaced(wanted, [cell.height for cell in run], top, bottom), strict=True):
        cell.y = y
