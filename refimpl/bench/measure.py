"""One cell, measured: its arena is given its method, and what comes of it is checked."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from refimpl.arena.protocol import Arena, Conditions
from refimpl.bench.cells import Cell, open_arena
from refimpl.bench.plugin import load_object
from refimpl.bench.store import Outcome


def measure(cell: Cell) -> Outcome:
    """Run one cell; what it raises becomes the outcome's `error`, so that the others go on."""
    arena = open_arena(cell.arena)
    conditions = Conditions(
        torch.Generator().manual_seed(cell.seed),
        torch.device(cell.device),
        cell.axes,
        quick=cell.quick,
        model=Path(cell.model) if cell.model else None,
        texts=Path(cell.texts) if cell.texts else None,
    )
    try:
        with torch.random.fork_rng([conditions.device] if conditions.device.type == "cuda" else []):
            torch.manual_seed(cell.seed)  # for what draws without a generator: the cells before it must not matter
            figures = _figures(arena, cell, conditions)
        return Outcome(figures=_complete(figures, arena), curves=_curves(conditions.curves))
    except (Exception, SystemExit) as error:  # a cell is somebody's method: whatever it raises is its result
        return Outcome(error=f"{type(error).__name__}: {error}".strip())


def _figures(arena: Arena, cell: Cell, conditions: Conditions) -> dict[str, float]:
    if cell.implementation is None:
        return arena.baseline(conditions)
    return arena.measure(load_object(cell.implementation), dict(cell.settings), conditions)


def _complete(figures: dict[str, Any], arena: Arena) -> dict[str, int | float]:
    """The figures in the arena's order, if they are those that it promises and all of them are numbers."""
    promised = [metric.name for metric in arena.METRICS]
    if sorted(figures) != sorted(promised):
        raise ValueError(f"figures {sorted(figures)} are not the arena's {sorted(promised)}")
    numbers = {name: figures[name] if type(figures[name]) is int else float(figures[name]) for name in promised}
    if broken := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise ValueError(f"{broken[0]} is {numbers[broken[0]]}, not a number that could be compared")
    return numbers


def _curves(curves: Mapping[str, Iterable[Iterable[float]]]) -> dict[str, list[tuple[float | None, ...]]]:
    """Curves as JSON can hold them: a value that is not finite, as of a training that diverged, is a gap."""
    return {
        name: [tuple(float(x) if math.isfinite(x) else None for x in point) for point in points]
        for name, points in curves.items()
    }
