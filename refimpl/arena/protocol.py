"""What an arena module provides.

    ABOUT      one sentence: substrate, task, what is compared
    VERSION    counts up whenever the same seed would give other figures
    METRICS    the figures of one cell, in the order of the table's columns
    BASELINE   name of the row that the others are compared with
    AXES       what every method is run on: `{"task": ("needle", "few_shot")}`; empty for a single task
    QUICK      the axes' values that the quick form keeps: `{"task": ("needle",)}`; an axis left out keeps all
    baseline(conditions) -> dict of metric to value
    measure(implementation, settings, conditions) -> dict of metric to value

`implementation` is the method's object (`RTN`), `settings` its configuration for this cell (`{"bits": 4}`). Both functions
draw everything random from `conditions.generator`, so that a seed fixes the substrate: every method meets the same one.
"""

from collections.abc import Mapping
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
        curves: figures over the run, `{"loss over tokens": [(tokens, loss), …]}`, which the arena may add to.
    """

    generator: torch.Generator
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    axes: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    model: Path | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


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
