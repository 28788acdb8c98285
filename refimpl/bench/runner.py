"""Run cells: what the store has is read, the rest is claimed, computed and stored one by one."""

import itertools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec

from refimpl.bench.cells import Cell
from refimpl.bench.engines import Pool, WorkerDied
from refimpl.bench.fingerprint import determinants, key
from refimpl.bench.progress import Told
from refimpl.bench.store import Outcome, Store


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One finished cell, as it stands in a document: the baseline's if `method` is the arena's baseline."""

    arena: str
    method: str
    settings: dict[str, Any]
    axes: dict[str, Any] = {}
    seed: int
    figures: dict[str, int | float]
    curves: dict[str, list[tuple[float | None, ...]]] = {}
    quick: bool = False
    simulated: bool = False
    error: str | None = None
    environment: dict[str, Any] = {}
    node: str = ""
    pid: int = 0


def run(
    cells: Sequence[Cell],
    store: Store,
    pool: Pool,
    *,
    retry: bool = False,
    told: Told | None = None,
    wait: Callable[[], object] = lambda: threading.Event().wait(0.2),
) -> list[Row]:
    """Rows of all cells, in their order.

    Args:
        cells: those that are the same are computed once.
        store: where they are kept.
        pool: what computes them.
        retry: compute anew those that failed before.
        told: who is told what happens.
        wait: called while all that is left is computed by other runs.
    """
    told = told or Told()
    known = determinants(cells, store.digest)
    keys = [key(each) for each in known]
    unique = {k: (cell, each) for k, cell, each in zip(keys, cells, known, strict=True)}
    outcomes = store.finished(unique, retry=retry)
    told.begin(len(unique), len(outcomes))

    def claimed() -> Iterator[tuple[str, Cell]]:
        for k, (cell, each) in unique.items():
            if k not in outcomes and store.claim(k, each, (cell.arena, cell.method), retry=retry):
                told.start(cell)
                yield k, cell

    def record(k: str, outcome: Outcome) -> None:
        outcomes[k] = outcome
        told.finish(outcome)

    try:
        while len(outcomes) < len(unique):
            mine = claimed()
            if (first := next(mine, None)) is not None:
                with closing(_computed(pool, itertools.chain([first], mine))) as results:
                    for k, outcome in results:
                        store.finish(k, outcome)
                        record(k, outcome)
            others = store.finished([k for k in unique if k not in outcomes], retry=retry)
            for k, outcome in others.items():
                record(k, outcome)
            if first is None and not others:
                wait()
    finally:
        store.release()
    return [_row(cell, outcomes[k]) for k, cell in zip(keys, cells, strict=True)]


def _computed(pool: Pool, cells: Iterator[tuple[str, Cell]]) -> Generator[tuple[str, Outcome]]:
    """Outcomes as they come. Where a process died, the cells that ran are run again one by one: which of them ends it?"""
    running: dict[str, Cell] = {}

    def handed_out() -> Iterator[tuple[str, Cell]]:
        for k, cell in cells:
            running[k] = cell
            yield k, cell

    while True:
        try:
            with closing(pool.each(handed_out())) as results:
                for k, outcome in results:
                    del running[k]
                    yield k, outcome
            return
        except WorkerDied:
            for k in list(running):
                yield k, _alone(pool, k, running.pop(k))


def _alone(pool: Pool, k: str, cell: Cell) -> Outcome:
    try:
        return dict(pool.each([(k, cell)]))[k]
    except WorkerDied as error:
        return Outcome(error=f"WorkerDied: the process that computed it ended: {error}")


def _row(cell: Cell, outcome: Outcome) -> Row:
    return Row(
        arena=cell.arena,
        method=cell.method,
        settings=cell.settings,
        axes=cell.axes,
        seed=cell.seed,
        figures=outcome.figures,
        curves=outcome.curves,
        quick=cell.quick,
        simulated=cell.simulated,
        error=outcome.error,
        environment=outcome.environment,
        node=outcome.node,
        pid=outcome.pid,
    )
