"""Run a method's cells in its arenas, beside the arena's baseline."""

import importlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from refimpl.arena.protocol import Arena
from refimpl.environment import environment
from refimpl.results import kept_rows
from taxonomy import Method


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One finished cell: the baseline's if `method` is the arena's baseline; with `error` if it failed."""

    arena: str
    method: str
    settings: dict[str, Any]
    seed: int
    figures: dict[str, float]
    simulated: bool = False
    error: str | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to run: `method` None stands for the arena's baseline."""

    arena: str
    method: Method | None
    settings: dict[str, Any]
    seed: int


def open_arena(name: str) -> Arena:
    """The arena module of that name.

    Raises:
        ValueError: there is none.
    """
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py")) if name.isidentifier() else []
    if name not in known or name in ("__init__", "protocol", "runner"):
        raise ValueError(f"unknown arena {name!r}; arenas are the modules of refimpl/arena/")
    return importlib.import_module(f"refimpl.arena.{name}")


def cells(methods: Sequence[Method], seeds: Sequence[int] = (0,)) -> list[Cell]:
    """Every combination of settings of every method in its arenas, after each arena's baseline."""
    found = []
    for arena in dict.fromkeys(name for method in methods for name in method.arena):
        found += [Cell(arena=arena, method=None, settings={}, seed=seed) for seed in seeds]
        for method in methods:
            grid = method.arena.get(arena)
            if grid is not None:
                combinations = itertools.product(*grid.values())
                found += [
                    Cell(arena=arena, method=method, settings=dict(zip(grid, values, strict=True)), seed=seed)
                    for values in combinations
                    for seed in seeds
                ]
    return found


def run_cell(cell: Cell, device: str = "cpu") -> Row:
    """Run one cell; what it raises becomes the row's `error`, so that the others go on."""
    arena = open_arena(cell.arena)
    generator = torch.Generator().manual_seed(cell.seed)
    row = Row(
        arena=cell.arena,
        method=cell.method.id if cell.method else arena.BASELINE,
        settings=cell.settings,
        seed=cell.seed,
        figures={},
        simulated=bool(cell.method and cell.method.simulated),
    )
    try:
        if cell.method is None:
            figures = arena.baseline(generator, torch.device(device))
        else:
            figures = arena.measure(cell.method.load(), cell.settings, generator, torch.device(device))
        row.figures = _complete(figures, arena)
    except Exception as error:  # a cell is somebody's method: whatever it raises is its result
        row.error = f"{type(error).__name__}: {error}"
    return row


def _complete(figures: dict[str, float], arena: Arena) -> dict[str, float]:
    """The figures, if they are those that the arena promises and all of them are numbers."""
    promised = [metric.name for metric in arena.METRICS]
    if sorted(figures) != sorted(promised):
        raise ValueError(f"figures {sorted(figures)} are not the arena's {sorted(promised)}")
    if broken := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise ValueError(f"{broken[0]} is {figures[broken[0]]}, not a number that could be compared")
    return figures


def run(todo: Sequence[Cell], device: str = "cpu", done: Callable[[Row], None] = lambda _: None) -> list[Row]:
    """Run cells one after the other; `done` is called after each, for progress."""
    rows = []
    for cell in todo:
        rows.append(run_cell(cell, device))
        done(rows[-1])
    return rows


def store(rows: Sequence[Row], folder: Path, device: str = "cpu") -> list[Path]:
    """Write one `<arena>.json` per arena: about, metrics, environment, rows.

    Rows of methods that did not run are kept, each with the environment that it was measured in.
    """
    written = []
    for name in dict.fromkeys(row.arena for row in rows):
        arena, path = open_arena(name), folder / f"{name}.json"
        fresh = [msgspec.to_builtins(row) for row in rows if row.arena == name]
        stamp = environment(device)
        kept = kept_rows(path, "rows", {row["method"] for row in fresh}, stamp)
        document = {
            "arena": name,
            "about": arena.ABOUT,
            "baseline": arena.BASELINE,
            "metrics": [metric._asdict() for metric in arena.METRICS],
            "environment": stamp,
            "rows": sorted(kept + fresh, key=lambda row: (row["method"] != arena.BASELINE, row["method"])),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        written.append(path)
    return written
