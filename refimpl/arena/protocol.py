"""Arenas: fixed substrates on which all methods of a family are run side by side; and what an arena's module provides.

An arena is a module of this folder. A method joins it in its YAML file, `arena: {weights: {bits: [2, 4]}}`; each combination
of the settings given there is run at each point of the arena's axes. `refimpl/bench` runs them.

    ABOUT      one sentence: substrate, task, what is compared
    VERSION    counts up whenever the same seed would give other figures
    METRICS    the figures of one cell, in the order of the table's columns
    BASELINE   name of the row that the others are compared with
    AXES       what every method is run on: `{"task": ("needle", "few_shot")}`; empty for a single task
    QUICK      the axes' values that the quick form keeps: `{"task": ("needle",)}`; an axis left out keeps all
    baseline(conditions) -> dict of metric to value
    measure(implementation, settings, conditions) -> dict of metric to value
    axes_of(texts) -> the axes where a folder of the user's texts takes the tasks' place; an arena that takes none leaves it out

`implementation` is the method's object (`RTN`), `settings` its configuration for this cell (`{"bits": 4}`). Both functions
draw everything random from `conditions.generator`, so that a seed fixes the substrate: every method meets the same one.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch


class Metric(NamedTuple):
    """One figure: its name, unit, which way is better, and whether it repeats exactly from a seed."""

    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    exact: bool = True


@dataclass(frozen=True)
class Conditions:
    """What one cell is run under.

    Args:
        generator: source of everything random, on the CPU.
        device: where to compute.
        axes: this cell's point on the arena's `AXES`.
        quick: less of the same, so that the cell takes about a second: fewer samples, fewer steps.
        model: a local Hugging Face folder; None stands for the testbed. An arena that can't use one raises.
        texts: a local folder of texts, given to arenas that have `axes_of`; None stands for the arena's own.
        curves: figures over the run, `{"loss over tokens": [(tokens, loss), …]}`, which the arena may add to; of three numbers
            a point makes a map, `{"score over depth and length": [(depth, length, score), …]}`.
    """

    generator: torch.Generator
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    axes: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    model: Path | None = None
    texts: Path | None = None
    curves: dict[str, Sequence[tuple[float, ...]]] = field(default_factory=dict)


def takes_no_model(conditions: Conditions) -> None:
    """For an arena whose substrate is synthetic.

    Raises:
        ValueError: a model was given.
    """
    if conditions.model is not None:
        raise ValueError(f"--model {conditions.model}: this arena's substrate is synthetic; leave the option out")


def clock(device: torch.device) -> float:
    """Seconds by a clock that goes on only, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Arena(Protocol):
    """An arena module, as the runner sees it."""

    ABOUT: str
    VERSION: int
    METRICS: tuple[Metric, ...]
    BASELINE: str
    AXES: dict[str, tuple[Any, ...]]
    QUICK: dict[str, tuple[Any, ...]]

    def baseline(self, conditions: Conditions) -> dict[str, float]:
        """Figures of the baseline."""
        ...

    def measure(self, implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
        """Figures of one method with one configuration."""
        ...
