"""What there is to run: a cell is one method, with one configuration, at one point of an arena's axes, from one seed.

The full form of an arena is the whole grid of the YAML files' `arena:` lists, times all points of its axes, times the seeds.
The quick form keeps the first value of each list and the axes' values that the arena's `QUICK` names.
"""

import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import refimpl.arena
from refimpl.arena.protocol import Arena
from taxonomy import Method
from taxonomy.schema import near


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing to run, by itself enough to run it in another process.

    Args:
        arena: name of the arena's module.
        method: what the tables show: a method's id, a plugin's `module:Class`, or the name of the arena's baseline.
        implementation: `module:Object`; None stands for the arena's baseline.
        settings: the method's configuration.
        axes: the point on the arena's axes.
        seed: from which everything random is drawn.
        quick: the arena's quick form.
        simulated: the method only imitates its saving.
        device: torch device.
        model: a local Hugging Face folder; None stands for the testbed.
        texts: a local folder of texts; None stands for the arena's own.
    """

    arena: str
    method: str
    implementation: str | None
    settings: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    seed: int = 0
    quick: bool = False
    simulated: bool = False
    device: str = "cpu"
    model: str | None = None
    texts: str | None = None


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody's own class, which meets the cells of an arena beside the methods.

    Args:
        name: `package.module:Class`.
        grid: values of its settings; empty for its defaults.
    """

    name: str
    grid: dict[str, list[Any]] = {}


def arenas() -> list[str]:
    """Names of the arenas: the modules of `refimpl/arena/`, here and in other folders of Python's path."""
    found = {path.stem for folder in refimpl.arena.__path__ for path in Path(folder).glob("*.py")}
    return sorted(found - {"protocol"})


def open_arena(name: str) -> Arena:
    """The arena module of that name; `-` may stand for `_`.

    Raises:
        ValueError: there is none.
    """
    module = name.replace("-", "_")
    if module not in arenas():
        raise ValueError(f"unknown arena {name!r}{near(module, arenas())} (`effllm bench` lists all)")
    arena: Arena = importlib.import_module(f"refimpl.arena.{module}")
    return arena


def axes_of(arena: Arena, texts: str | None = None) -> dict[str, tuple[Any, ...]]:
    """An arena's axes; on texts of the user's, those that their folder gives.

    Raises:
        ValueError: the arena takes no texts.
    """
    if texts is None:
        return arena.AXES
    if not hasattr(arena, "axes_of"):
        raise ValueError(f"--texts {texts}: this arena takes no texts of the user's; leave the option out")
    found: dict[str, tuple[Any, ...]] = arena.axes_of(Path(texts))
    return found


def points(arena: Arena, quick: bool = False, texts: str | None = None) -> list[dict[str, Any]]:
    """All points of an arena's axes; a single empty one where it has none. What texts of the user's give stays whole in the quick form."""
    axes = axes_of(arena, texts)
    kept = {
        name: tuple(value for value in values if value in arena.QUICK[name])
        if quick and name in arena.QUICK and values == arena.AXES[name]
        else values
        for name, values in axes.items()
    }
    return [dict(zip(kept, values, strict=True)) for values in itertools.product(*kept.values())]


def combinations(grid: Mapping[str, Sequence[Any]], quick: bool = False) -> list[dict[str, Any]]:
    """All combinations of a grid's values; the quick form has the one of the first values."""
    kept = [values[:1] if quick else values for values in grid.values()]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*kept)]


def cells(
    methods: Iterable[Method],
    *,
    arenas: Sequence[str] | None = None,
    plugins: Sequence[Plugin] = (),
    seeds: Iterable[int] = (0,),
    quick: bool = False,
    device: str = "cpu",
    model: str | None = None,
    texts: str | None = None,
) -> list[Cell]:
    """The cells of methods in their arenas, each arena's baseline first.

    Args:
        methods: those without `arena:` have none.
        arenas: only these, in this order, also where only the baseline or a plugin runs; None stands for the methods' own.
        plugins: run in each of `arenas`.
        seeds: one cell for each.
        quick: the quick form.
        device: torch device of every cell.
        model: local folder of a model for every cell.
        texts: local folder of texts for every cell.

    Raises:
        ValueError: an arena is unknown, or takes no texts.
    """
    methods, seeds = list(methods), list(seeds)
    found = []
    for name in dict.fromkeys(a for m in methods for a in m.arena) if arenas is None else arenas:
        arena = open_arena(name)
        runs: list[tuple[str, str | None, Mapping[str, Sequence[Any]], bool]] = [(arena.BASELINE, None, {}, False)]
        runs += [(m.id, f"{m.module}:{m.impl}", m.arena[name], m.simulated) for m in methods if name in m.arena]
        runs += [(plugin.name, plugin.name, plugin.grid, False) for plugin in plugins]
        found += [
            Cell(
                arena=name,
                method=label,
                implementation=implementation,
                settings=settings,
                axes=axes,
                seed=seed,
                quick=quick,
                simulated=simulated,
                device=device,
                model=model,
                texts=texts,
            )
            for label, implementation, grid, simulated in runs
            for settings in combinations(grid, quick)
            for axes in points(arena, quick, texts)
            for seed in seeds
        ]
    return found
