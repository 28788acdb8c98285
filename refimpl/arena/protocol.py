"""What an arena module provides.

    ABOUT      one sentence: substrate, task, what is compared
    METRICS    the figures of one cell, in the order of the table's columns
    BASELINE   name of the row that the others are compared with
    baseline(generator, device) -> dict of metric to value
    measure(implementation, settings, generator, device) -> dict of metric to value

`implementation` is the method's object (`RTN`), `settings` its configuration for this cell (`{"bits": 4}`). Both functions
draw everything random from `generator`, so that a seed fixes the substrate: every method meets the same one.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch


class Metric(NamedTuple):
    """One figure: its name, unit, which way is better, and whether it repeats exactly from a seed."""

    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    exact: bool = True


class Arena(Protocol):
    """An arena module, as the runner sees it."""

    ABOUT: str
    METRICS: tuple[Metric, ...]
    BASELINE: str

    def baseline(self, generator: torch.Generator, device: torch.device) -> dict[str, float]:
        """Figures of the baseline on the substrate that `generator` draws."""
        ...

    def measure(
        self, implementation: Any, settings: dict[str, Any], generator: torch.Generator, device: torch.device
    ) -> dict[str, float]:
        """Figures of one method with one configuration on the substrate that `generator` draws."""
        ...
