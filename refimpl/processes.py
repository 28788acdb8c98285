"""Start real processes of this machine that compute together, and learn which one failed.

Source: none; `multiprocessing` and `torch.distributed`.

Differs from `torch.multiprocessing.spawn`: results come back; arguments are copied, where tensors would be shared; the rank
that died first is named, not one whose connection broke in consequence; ranks end with the process that started them, also
when it is killed.

Not here: several machines (use torchrun and `refimpl.distributed.joined`), restarts.

Examples:
    A function of a module is run once in each process; a program that starts processes has `if __name__ == "__main__":`.

    >>> launch(rank_and_size, 1)
    [(0, 1)]
"""

import copy
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refimpl.distributed import Group, joined

GRACE = 0.5  # seconds in which the other ranks' errors may arrive after the first one, so that the cause can be told


class RankFailed(RuntimeError):
    """A process died; `rank` is the first one that did."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(rank, message)  # both, so that the error can pass between processes
        self.rank = rank

    def __str__(self) -> str:
        return str(self.args[1])


def rank_and_size(group: Group) -> tuple[int, int]:
    """The smallest program: who am I, and how many are we?"""
    return group.rank, group.size


def launch(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    device: str = "cpu",
    threads: int = 1,
    timeout: float = 600.0,
) -> list[Any]:
    """Run `function(group, *arguments)` in `size` new processes of this machine.

    Args:
        function: of a module that can be imported; each process gets its own copy of the arguments.
        size: number of processes, 1 or more.
        arguments: what else it is called with; tensors and modules may be among them.
        device: `cpu` or `cuda`; there, as many GPUs as processes.
        threads: of each process, for computing.
        timeout: seconds for everything.

    Returns:
        What the ranks returned, by rank.

    Raises:
        ValueError: no processes.
        RankFailed: a process raised, exited or was killed; names it and its error. The others are killed.
        TimeoutError: names the ranks that had not finished; all are killed.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 process")
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        ends: list[tuple[Connection, Connection]] = [context.Pipe() for _ in range(size)]
        processes = [
            context.Process(
                target=_rank,
                args=(far, function, arguments, threads, (rank, size, meeting, device, timeout)),
                name=f"rank {rank}",
                daemon=True,
            )
            for rank, (_, far) in enumerate(ends)
        ]
        try:
            for process in processes:
                process.start()
            for _, far in ends:
                far.close()
            return _collect(processes, [near for near, _ in ends], timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
                    process.close()
            for near, far in ends:
                near.close()
                far.close()


def _context() -> ForkServerContext | SpawnContext:
    """Children of a server that has imported torch once start in a tenth of a second; elsewhere every one imports it.

    `torch._dynamo` is what PyTorch imports when a process makes its first optimizer; it takes as long as torch itself.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    # joblib's workers pass on the name of their own way to start processes, which only joblib knows.
    modules = ["torch", "torch._dynamo", "torch.distributed", "refimpl.distributed", "joblib.externals.loky"]
    context.set_forkserver_preload(modules)
    return context


class _Failure(NamedTuple):
    """In the order of blame: who died in silence, then whose exception was raised first."""

    told: bool
    moment: float
    rank: int
    error: str
    details: str = ""


def _rank(
    far: Connection, function: Callable[..., Any], arguments: Any, threads: int, place: tuple[int, int, str, str, float]
) -> None:
    """One process: join, compute, report; end at once when the parent ends, however it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        arguments = copy.deepcopy(arguments)  # tensors arrive in memory that all ranks share
        with joined(*place) as group:
            result = function(group, *arguments)
        far.send(result)
        far.recv()  # tensors are fetched from this process: live until they are
    except BaseException as error:  # whatever ends a rank is reported under its name
        moment = time.monotonic()
        details = traceback.format_exc()
        far.send(_Failure(True, moment, place[0], f"{type(error).__name__}: {error}", details))
        os._exit(1)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _collect(processes: Sequence[BaseProcess], ends: list[Connection], timeout: float) -> list[Any]:
    """Results by rank, or the error of the first rank that failed."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    waiting = dict(enumerate(ends))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in connection.wait([*waiting.values(), *(processes[rank].sentinel for rank in waiting)], left):
            rank = _rank_of(ready, waiting, processes)
            if rank is None:
                continue  # its end of the pipe and its death were both ready
            message = _received(waiting.pop(rank), processes[rank], rank)
            if isinstance(message, _Failure):
                deadline = min(deadline, time.monotonic() + GRACE)
                failures[rank] = message
            else:
                results[rank] = message
                ends[rank].send(None)
    if failures:
        first, *others = sorted(failures.values())
        also = "".join(f"\nafter it, rank {other.rank}: {other.error}" for other in others)
        raise RankFailed(first.rank, f"rank {first.rank} of {len(ends)}: {first.error}{also}\n{first.details}".rstrip())
    if waiting:
        raise TimeoutError(f"ranks {sorted(waiting)} of {len(ends)} did not finish in timeout={timeout:g} seconds")
    return [results[rank] for rank in range(len(ends))]


def _rank_of(ready: Any, waiting: dict[int, Connection], processes: Sequence[BaseProcess]) -> int | None:
    return next((rank for rank, end in waiting.items() if ready in (end, processes[rank].sentinel)), None)


def _received(end: Connection, process: BaseProcess, rank: int) -> Any:
    """A rank's result or failure; if it died without a word, how."""
    try:
        if end.poll():
            return end.recv()
    except (EOFError, ConnectionResetError):
        pass  # it ended with its pipe open and nothing in it
    process.join()
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return _Failure(False, time.monotonic(), rank, f"{how}, without a result")
