"""Runs: what is stored is not run again, what fails is a row, and other runs on the same store are left their cells."""

import contextlib
import itertools
import os
import signal

import msgspec
import pytest

from refimpl.bench import runner
from refimpl.bench.cells import Cell
from refimpl.bench.engines import Pool
from refimpl.bench.fingerprint import determinants, key
from refimpl.bench.progress import Told
from refimpl.bench.runner import Row, run
from refimpl.bench.store import Outcome, Store
from tests.bench.conftest import another_process, toy


@pytest.fixture
def pool():
    return Pool("here")


@pytest.fixture
def marks(tmp_path):
    return tmp_path / "marks"


def ran(marks):
    """Gains of the cells that were run, in order."""
    return [float(line.split()[0]) for line in marks.read_text().splitlines()] if marks.exists() else []


def test_rows_come_in_the_order_of_the_cells(toys, store, pool):
    """Oracle: the toy's rule; the seed's draw is the same in both."""
    cells = [toy(gain=2.0), toy(None), toy(gain=1.0, seed=3)]
    rows = run(cells, store, pool)
    assert [(row.settings, row.seed) for row in rows] == [({"gain": 2.0}, 0), ({}, 0), ({"gain": 1.0}, 3)]
    assert rows[0].figures["score"] - rows[1].figures["score"] == pytest.approx(2)
    assert rows[0].axes == {"task": "sum", "length": 1}
    assert rows[0].environment["device"] == "cpu" and rows[0].environment["threads"] >= 1
    assert rows[0].pid == os.getpid() and rows[0].node
    assert rows[0].curves["score over steps"][-1] == (3, 6)


def test_what_is_finished_is_not_run_again(toys, store, pool, marks):
    cells = [toy(gain=float(gain), marks=marks) for gain in range(3)]
    first = run(cells[:2], store, pool)
    again = run(cells, store, pool)
    assert ran(marks) == [0, 1, 2]
    assert again[:2] == first
    with Store(store.path) as other:
        assert run(cells, other, pool) == again
    assert ran(marks) == [0, 1, 2]


def test_a_cell_that_is_asked_for_twice_is_run_once(toys, store, pool, marks):
    cell = toy(marks=marks)
    named = msgspec.structs.replace(cell, method="also known as", simulated=True)
    rows = run([cell, named, cell], store, pool)
    assert len(ran(marks)) == 1
    assert [(row.method, row.simulated) for row in rows] == [("Good", False), ("also known as", True), ("Good", False)]


def test_a_failing_cell_is_a_row_and_the_run_goes_on(toys, store, pool, marks):
    cells = [toy("Bad", gain=1.0, marks=marks), toy(gain=2.0, marks=marks)]
    told = Told()
    bad, good = run(cells, store, pool, told=told)
    assert (bad.error, bad.figures) == ("RuntimeError: no luck", {})
    assert good.error is None
    assert (told.total, told.finished, told.failed) == (2, 2, 1)
    with Store(store.path) as later:
        assert run(cells, later, pool) == [bad, good]
        assert ran(marks) == [1, 2]
        run(cells, later, pool, retry=True)
    assert ran(marks) == [1, 2, 1]


def test_quick_and_full_are_cells_of_their_own(toys, store, pool):
    quick, full = run([toy(quick=True), toy()], store, pool)
    assert (quick.quick, full.quick) == (True, False)
    assert len(quick.curves["score over steps"]) == 2 and len(full.curves["score over steps"]) == 4


def test_an_interrupt_leaves_what_is_done_and_gives_back_the_rest(toys, store, pool, marks):
    cells = [toy(gain=1.0, marks=marks), toy("Interrupted", marks=marks), toy(gain=2.0, marks=marks)]
    told = Told()
    with pytest.raises(KeyboardInterrupt):
        run(cells, store, pool, told=told)
    assert (told.total, told.finished) == (3, 1)
    [left] = store._db.execute("SELECT count(*) FROM cells WHERE outcome IS NULL").fetchone()
    assert left == 0
    assert ran(marks) == [1]
    run([cells[0], cells[2]], store, pool)
    assert ran(marks) == [1, 2]


def test_cells_of_another_run_are_left_to_it_and_read_at_the_end(toys, store, pool, marks):
    """The other run, in this process, finishes its cell while this one has nothing else to do but wait."""
    mine, others = toy(gain=1.0, marks=marks), toy(gain=2.0, marks=marks)
    (determined,) = determinants([others], store.digest)
    with Store(store.path) as other:
        assert other.claim(key(determined), determined, ("toy", "Good"))
        waited = []

        def wait():
            waited.append(ran(marks))
            if len(waited) == 2:
                other.finish(key(determined), Outcome(figures={"score": 77.0, "cost": 8}))

        rows = run([others, mine], store, pool, wait=wait)
    assert waited == [[1], [1]]
    assert rows[0].figures["score"] == 77
    assert ran(marks) == [1]


def test_what_another_run_gives_back_is_taken_up(toys, store, pool, marks):
    cell = toy(gain=2.0, marks=marks)
    (determined,) = determinants([cell], store.digest)
    with Store(store.path) as other:
        other.claim(key(determined), determined, ("toy", "Good"))
        run([cell], store, pool, wait=other.release)
    assert ran(marks) == [2]


def test_a_killed_run_goes_on_where_it_was(toys, store, pool, marks):
    """SIGKILL in the middle of the third of five cells: two are there, the third starts anew, none is run twice that was done."""
    cells = [toy("Blocks" if gain == 2 else "Good", gain=float(gain), marks=marks) for gain in range(5)]
    process = another_process(toys, store.path, cells)
    assert process.stdout.readline() == "blocking\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert ran(marks) == [0, 1, 2]
    told = Told()
    rows = run(cells, store, pool, told=told)
    assert (told.total, told.finished) == (5, 5)
    assert ran(marks) == [0, 1, 2, 2, 3, 4]
    assert [row.error for row in rows] == [None] * 5
    assert len({row.pid for row in rows}) == 2  # two rows are the killed process's


def test_two_runs_at_once_share_the_cells(toys, store, pool, marks, tmp_path):
    """Two processes, the same cells. The first two cells meet over a pipe: they end only if both are run at the same time,
    by one process each. Oracle: the lines that the cells leave; each ran exactly once, and both runs have all rows."""
    os.mkfifo(tmp_path / "pipe")
    cells = [toy("Meets", end=end, pipe=tmp_path / "pipe", marks=marks) for end in ("r", "w")]
    cells += [toy(gain=float(gain), marks=marks) for gain in range(20)]
    processes = [another_process(toys, store.path, cells) for _ in range(2)]
    try:
        rows = [msgspec.json.decode(process.communicate(timeout=300)[0], type=list[Row]) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    lines = marks.read_text().splitlines()
    assert len(lines) == len(cells)
    assert sorted(ran(marks)) == sorted([1.0, 1.0, *map(float, range(20))])
    assert len({line.split()[-1] for line in lines}) == 2
    assert rows[0] == rows[1] == run(cells, store, pool)
    assert len(marks.read_text().splitlines()) == len(cells)


class Dies:
    """A pool whose process dies with cells of gain 9, two cells at a time."""

    def __init__(self):
        self.rounds = []

    def each(self, cells):
        cells = iter(cells)
        while batch := list(itertools.islice(cells, 2)):
            self.rounds.append([cell.settings["gain"] for _, cell in batch])
            if any(cell.settings["gain"] == 9 for _, cell in batch):
                raise runner.WorkerDied("exit code -9")
            yield from ((k, Outcome(figures={"score": cell.settings["gain"]})) for k, cell in batch)


def test_a_cell_that_kills_its_process_is_found_and_the_others_go_on(toys, store):
    """Oracle: by hand. Of the two that ran when the process died, each is run by itself; one is guilty."""
    pool = Dies()
    rows = run([toy(gain=float(gain)) for gain in (1, 9, 2, 3)], store, pool)
    assert [row.figures.get("score") for row in rows] == [1, None, 2, 3]
    assert rows[1].error == "WorkerDied: the process that computed it ended: exit code -9"
    assert pool.rounds == [[1, 9], [1], [9], [2, 3]]


def test_rows_of_before_axes_are_read():
    """Oracle: a row of an earlier document."""
    row = msgspec.convert({"arena": "weights", "method": "rtn", "settings": {}, "seed": 0, "figures": {}}, Row)
    assert (row.axes, row.curves, row.quick) == ({}, {}, False)


def test_a_real_cell(store, pool):
    cell = Cell(arena="weights", method="16 bit", implementation=None, quick=True)
    [row] = run([cell], store, pool)
    assert row.figures["compression"] == 1
