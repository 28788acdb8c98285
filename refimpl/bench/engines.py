"""Where cells are computed: in this process, in processes of this machine (loky), or on a Ray cluster; all through joblib."""

import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from multiprocessing import resource_tracker
from typing import Any, Literal

import torch
from joblib import Parallel, cpu_count, delayed, parallel_config, register_parallel_backend

from refimpl.bench.cells import Cell
from refimpl.bench.measure import measure
from refimpl.bench.store import Outcome

# What joblib tells of a run that is interrupted; the command says it in its own words.
warnings.filterwarnings(
    "ignore", r"\d+ tasks (have been successfully executed|which were still being processed)", UserWarning
)

Engine = Literal["loky", "ray", "here"]
ENGINES: tuple[Engine, ...] = ("loky", "ray", "here")
Done = tuple[str, Outcome]


class WorkerDied(Exception):
    """A process that computed cells is gone: killed for want of memory, or by a fault in compiled code."""


class Pool:
    """Computes cells, `jobs` at a time.

    Args:
        engine: processes of this machine, a Ray cluster, or `here`, this process: quicker to begin, and a debugger follows; but a cell
            that ends its process ends the run.
        jobs: cells at a time; None stands for one a core, or a single one on an accelerator, whose times sharing would spoil.
        device: what the cells compute on.

    Raises:
        ValueError: jobs below 1, or several in this process.
    """

    def __init__(self, engine: Engine = "loky", jobs: int | None = None, device: str = "cpu") -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        if engine == "here":
            if jobs not in (None, 1):
                raise ValueError(f"jobs={jobs} must be 1 in this process; engine 'loky' has several")
            jobs = 1
        accelerator = torch.device(device).type != "cpu"
        cores = _connect(accelerator) if engine == "ray" else cpu_count(only_physical_cores=True)
        self.engine, self.jobs = engine, jobs or (1 if accelerator and engine != "ray" else max(1, cores))
        self.threads = max(1, min(cores // self.jobs, torch.get_num_threads()))
        share = cores / max(2, self.jobs)
        self._held = {"num_gpus" if accelerator else "num_cpus": share if share < 1 else min(self.threads, int(share))}

    def each(self, cells: Iterable[tuple[str, Cell]]) -> Generator[Done]:
        """Keys with outcomes, as they finish; the next cell is taken from the iterable when a process is free.

        Args:
            cells: key and cell.

        Raises:
            WorkerDied: with a cell that ended its process.
        """
        work = partial(compute, threads=self.threads, path=tuple(sys.path))
        if self.engine == "here":
            yield from (work(*item) for item in cells)
            return
        jobs = max(2, self.jobs)  # joblib runs a single one in this process
        with self._backend():
            parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=self.jobs, batch_size=1)
            with _deaf_to_interrupts():
                results = parallel(delayed(work)(*item) for item in cells)
            try:
                yield from results
            except Exception as error:
                if isinstance(error, _died()):
                    raise WorkerDied(str(error).splitlines()[0]) from error
                raise
            finally:
                results.close()

    @contextmanager
    def _backend(self) -> Iterator[None]:
        if self.engine == "loky":
            with parallel_config("loky", inner_max_num_threads=self.threads):
                yield
            return
        with parallel_config("ray-unordered", ray_remote_args={**self._held, "scheduling_strategy": "SPREAD"}):
            yield


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes begun in here inherit that ^C, which a terminal sends to all of them, is for this one alone, which ends them.

    Left to themselves they would print where each of them stood.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # which unblocks what it finds blocked, if it has yet to begin
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def compute(key: str, cell: Cell, *, threads: int, path: tuple[str, ...]) -> Done:
    """One cell, in whatever process; `path` is where its code is imported from."""
    sys.path += [folder for folder in path if folder not in sys.path]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    start = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # what a method prints is not a part of the output
            outcome = measure(cell)
        outcome.environment = dict(_environment(cell.device, threads))
    finally:
        torch.set_num_threads(before)
    outcome.seconds = round(time.perf_counter() - start, 3)
    outcome.node, outcome.pid = _node(), os.getpid()
    return key, outcome


@cache
def _environment(device: str, threads: int) -> dict[str, Any]:  # noqa: ARG001  # the environment reads torch's number
    from refimpl.environment import environment

    return environment(device)


def _node() -> str:
    """The host, or the node of the Ray cluster that this process belongs to."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            return str(ray.get_runtime_context().get_node_id())
    return platform.node()


def _connect(accelerator: bool) -> int:
    """Join the Ray cluster of `RAY_ADDRESS`, or the one that runs here, or start one; how many processes it has room for.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: the cluster can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util.joblib.ray_backend import RayBackend

    class Unordered(RayBackend):
        """Ray's backend forbids generators with the one of multiprocessing that it derives from; its own pool can do them."""

        supports_return_generator = True

    register_parallel_backend("ray-unordered", Unordered)
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        address = os.environ.get("RAY_ADDRESS")
        try:
            ray.init(address=address or "auto", **quiet)
        except ConnectionError as error:
            if address:
                raise ConnectionError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
            ray.init(include_dashboard=False, **quiet)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("GPU" if accelerator else "CPU", 1))


def _died() -> tuple[type[Exception], ...]:
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    if "ray" not in sys.modules:
        return (TerminatedWorkerError,)
    from ray.exceptions import RayActorError

    return TerminatedWorkerError, RayActorError
