"""What a run says of itself while it goes on."""

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from refimpl.bench.cells import Cell
from refimpl.bench.store import Outcome

LINE_EVERY = 60.0  # seconds


class Told:
    """Who is told what happens; this one says nothing, and counts.

    Attributes:
        total: cells of the run.
        finished: those that are finished, here, before or in another run.
        failed: those that were finished since it began, with an error.
    """

    total = finished = failed = 0

    def begin(self, total: int, stored: int) -> None:
        """How many cells there are, and how many of them were finished before."""
        self.total, self.finished = total, stored

    def start(self, cell: Cell) -> None:
        """A cell is handed to a process."""

    def finish(self, outcome: Outcome) -> None:
        """A cell is finished, here or in another run."""
        self.finished += 1
        self.failed += outcome.error is not None


class Bar(Told):
    """Cells done, time left, failures: a bar on a terminal, which names the cell handed out last; elsewhere a line, once a minute at most.

    Args:
        console: where.
        clock: seconds; cells take minutes, so the time left is told from all that were finished in the last hour.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._said = console, clock, clock()
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=3600,
            get_time=clock,
        )
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, total: int, stored: int) -> None:
        """Draw the bar; what was finished before is done already, and tells nothing about the time that is left."""
        super().begin(total, stored)
        self._task = self._bar.add_task("", total=total, completed=stored)
        self._bar.advance(self._task, 0)  # from here on time counts

    def start(self, cell: Cell) -> None:
        """Name the cell."""
        told = " ".join(map(str, [cell.method, *cell.settings.values(), *cell.axes.values()]))
        failures = f"[red]{self.failed} failed[/] " if self.failed else ""
        self._bar.update(self._task, description=f"{failures}{escape(f'{cell.arena}: {told}'[:60])}")

    def finish(self, outcome: Outcome) -> None:
        """Move on."""
        super().finish(outcome)
        self._bar.advance(self._task)
        if not self._console.is_terminal and self.finished < self.total and self._clock() - self._said >= LINE_EVERY:
            self._said = self._clock()
            failures = f", {self.failed} failed" if self.failed else ""
            left = self._bar.tasks[0].time_remaining
            time_left = "" if left is None else f", {timedelta(seconds=left)} left"
            self._console.print(f"{self.finished} of {self.total} cells{failures}{time_left}", highlight=False)
