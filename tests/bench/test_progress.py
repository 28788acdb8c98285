"""What a run says of itself."""

import io

from rich.console import Console

from refimpl.bench.progress import Bar, Told
from refimpl.bench.store import Outcome
from tests.bench.conftest import toy


def told(bar):
    bar.begin(5, 2)
    bar.start(toy(gain=7.5))
    bar.finish(Outcome())
    bar.finish(Outcome(error="E: no"))
    bar.start(toy("[red]", gain=8.5))
    return bar.total, bar.finished, bar.failed


def test_cells_are_counted():
    """Oracle: by hand. Two were finished before, two are finished now, one of them failed."""
    assert told(Told()) == (5, 4, 1)


def test_a_terminal_gets_a_bar_that_goes_away():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with Bar(console) as bar:
        assert told(bar) == (5, 4, 1)
        bar._bar.refresh()
        shown = console.file.getvalue()
    assert "4/5" in shown and "1 failed" in shown and "toy: [red] 8.5 sum 1" in shown


def test_elsewhere_nothing_is_said():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Bar(console) as bar:
        assert told(bar) == (5, 4, 1)
    assert console.file.getvalue() == ""
