"""What a run says while it goes on. Oracle: by hand, with a clock that is set."""

import io

import pytest
from rich.console import Console

from refimpl.bench.progress import Bar
from refimpl.bench.store import Outcome
from tests.bench.conftest import toy


class Clock:
    """Stands until it is told to go on."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # on one that is dumb no bar is drawn
    return Clock()


def bar(clock, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return Bar(console, clock), console.file


def test_off_a_terminal_a_line_a_minute(clock):
    """Cells of 40 seconds, of eight one was there before: 40 s too soon, 80 s said, 120 s too soon, 160 s said with 3 cells left; a failed one counts."""
    told, file = bar(clock, terminal=False)
    with told:
        told.begin(8, 1)
        for number in range(7):
            told.start(toy())
            clock.now += 40
            told.finish(Outcome(error="ValueError: x" if number == 2 else None))
    assert file.getvalue().splitlines() == [
        "3 of 8 cells, 0:03:20 left",
        "5 of 8 cells, 1 failed, 0:02:00 left",
        "7 of 8 cells, 1 failed, 0:00:40 left",
    ]


def test_a_short_run_says_nothing_off_a_terminal(clock):
    told, file = bar(clock, terminal=False)
    with told:
        told.begin(2, 0)
        for _ in range(2):
            clock.now += 59
            told.finish(Outcome())
    assert file.getvalue() == ""


def test_on_a_terminal_a_bar_with_the_time_left_and_what_failed(clock):
    told, file = bar(clock, terminal=True)
    with told:
        told.begin(4, 0)
        told.start(toy(axes={"task": "sum"}))
        clock.now += 90
        told.finish(Outcome(error="ValueError: x"))
        told.start(toy(axes={"task": "count"}))
        told._bar.refresh()
        drawn = file.getvalue()
    assert "1/4" in drawn and "0:04:30" in drawn and "1 failed" in drawn and "count" in drawn
    assert "of 4 cells" not in drawn
