"""What a run says of itself while it goes on."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from refimpl.bench.cells import Cell
from refimpl.bench.store import Outcome


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
    """A bar on a terminal, and nothing elsewhere: cells done, time left, the cell handed out last, failures."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
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

    def start(self, cell: Cell) -> None:
        """Name the cell."""
        told = " ".join(map(str, [cell.method, *cell.settings.values(), *cell.axes.values()]))
        failures = f"[red]{self.failed} failed[/] " if self.failed else ""
        self._bar.update(self._task, description=f"{failures}{escape(f'{cell.arena}: {told}'[:60])}")

    def finish(self, outcome: Outcome) -> None:
        """Move on."""
        super().finish(outcome)
        self._bar.advance(self._task)
