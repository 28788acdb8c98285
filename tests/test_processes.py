"""Processes that compute together: results come back, whoever dies is named, nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refimpl.processes import RankFailed, launch
from tests.process_programs import answer, fail, late, wait_for_ever

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads /proc")


def test_results_come_back_by_rank_and_arguments_are_copies():
    """Oracle: by hand."""
    tensor = torch.zeros(3)
    results = launch(answer, 3, 10, tensor, threads=1)
    assert [result["rank"] for result in results] == [10, 11, 12]
    assert [result["tensor"].tolist() for result in results] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert {result["threads"] for result in results} == {1}
    assert tensor.tolist() == [0.0] * 3  # negative control: neither the ranks nor this process share it


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1 of 3: ValueError: the culprit's own words"),
        ("kill", "rank 1 of 3: killed by SIGKILL"),
        ("exit", "rank 1 of 3: exited with code 7"),
        ("leave", "rank 1 of 3: exited with code 0, without a result"),
        ("sys.exit", "rank 1 of 3: SystemExit: 3"),
    ],
)
def test_the_rank_that_died_is_named_in_seconds(how, message):
    """Oracle: the culprit, who is not rank 0; the others' connections break only after it."""
    start = time.monotonic()
    with pytest.raises(RankFailed, match=message) as caught:
        launch(fail, 3, how, 1)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 20  # of which most is importing torch; the exchange alone would wait for 600
    if how == "raise":
        assert "process_programs.py" in str(caught.value)  # its traceback


def test_ranks_that_do_not_finish_are_named():
    """Oracle: rank 1 waits for ever."""
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not finish in timeout=3 seconds"):
        launch(late, 2, timeout=3)


def test_no_rank_outlives_its_parent(tmp_path):
    """Oracle: the kernel's list of processes, after the parent was killed where it can't clean up."""
    code = f"from refimpl.processes import launch; from tests.process_programs import wait_for_ever; launch(wait_for_ever, 2, {str(tmp_path)!r})"
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as parent:
        ranks = [_pid(tmp_path / f"{rank}.pid") for rank in range(2)]
        assert all(Path(f"/proc/{rank}").exists() for rank in ranks)
        os.kill(parent.pid, signal.SIGKILL)
    assert _within(10, lambda: not any(_lives(rank) for rank in ranks))


def test_after_a_failure_no_rank_lives(tmp_path):
    """Oracle: the kernel's list of processes."""
    with pytest.raises(TimeoutError):
        launch(wait_for_ever, 2, str(tmp_path), timeout=5)
    assert not any(_lives(int(file.read_text())) for file in tmp_path.glob("*.pid"))
    assert len(list(tmp_path.glob("*.pid"))) == 2


def _pid(file):
    assert _within(60, file.exists)
    return int(file.read_text())


def _within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True


def _lives(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_worker_of_joblib_can_start_processes(tmp_path):
    """The benchmark's cells run in such workers. Their failures come back whole, too."""
    from joblib import Parallel, delayed

    tensor = torch.zeros(2)
    jobs = [delayed(launch)(answer, 2, 5, tensor) for _ in range(2)]
    assert [[row["rank"] for row in rows] for rows in Parallel(n_jobs=2)(jobs)] == [[5, 6], [5, 6]]
    with pytest.raises(RankFailed, match="the culprit's own words") as caught:
        Parallel(n_jobs=2)([delayed(launch)(fail, 2, "raise", 1) for _ in range(2)])
    assert caught.value.rank == 1


def test_no_processes_are_refused():
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        launch(answer, 0)
