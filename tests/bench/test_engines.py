"""Processes and clusters give what this process gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from refimpl.bench.engines import Pool, compute
from refimpl.bench.runner import run
from refimpl.bench.store import Store
from tests.bench.conftest import ROOT, toy


def outcomes(pool, cells):
    return dict(pool.each([(str(k), cell) for k, cell in enumerate(cells)]))


@pytest.fixture(scope="module", autouse=True)
def no_processes_left():
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def test_processes_give_what_this_process_gives(toys, tmp_path):
    """Oracle: the same cells one after the other in this process; all but where and how long."""
    cells = [toy(gain=float(gain), seed=seed, marks=tmp_path / "marks") for gain in range(3) for seed in range(2)]
    cells.append(toy("Bad"))
    here, there = outcomes(Pool("here"), cells), outcomes(Pool("loky", 2), cells)
    assert here.keys() == there.keys() == {str(k) for k in range(7)}
    for k in here:
        assert (here[k].figures, here[k].curves, here[k].error) == (there[k].figures, there[k].curves, there[k].error)
    assert {outcome.pid for outcome in here.values()} == {os.getpid()}
    assert os.getpid() not in {outcome.pid for outcome in there.values()}


def test_cores_are_shared_out(monkeypatch):
    """Oracle: by hand. Eight cores: cells x threads never exceeds them, nor the threads that were allowed before."""
    from refimpl.bench import engines

    monkeypatch.setattr(engines, "cpu_count", lambda only_physical_cores: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    made = [Pool("loky", jobs) for jobs in (None, 1, 2, 3, 8, 16)]
    assert [(pool.jobs, pool.threads) for pool in made] == [(8, 1), (1, 6), (2, 4), (3, 2), (8, 1), (16, 1)]
    shared = Pool("loky", None, "cuda")  # cells that share an accelerator would spoil each other's times
    assert (shared.jobs, shared.threads) == (1, 6)
    assert (Pool("here").jobs, Pool("here", 1, "cuda").threads) == (1, 6)
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        Pool("loky", 0)
    with pytest.raises(ValueError, match="jobs=2 must be 1 in this process; engine 'loky' has several"):
        Pool("here", 2)


def test_a_cell_computes_with_its_share_of_threads_and_leaves_no_trace(toys):
    before, path = torch.get_num_threads(), list(sys.path)
    key, outcome = compute("k", toy(), threads=1, path=("/nowhere/toys",))
    assert (key, outcome.environment["threads"]) == ("k", 1)
    assert torch.get_num_threads() == before
    assert sys.path == [*path, "/nowhere/toys"]
    sys.path.remove("/nowhere/toys")


def test_what_a_method_prints_is_not_in_the_output(toys, monkeypatch, capsys):
    from refimpl.bench.cells import open_arena

    monkeypatch.setattr(open_arena("toy"), "baseline", lambda _: {"score": sys.stdout.write("hello"), "cost": 1})
    compute("k", toy(None), threads=1, path=())
    assert capsys.readouterr() == ("", "hello")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_dies_is_noticed_and_costs_its_cell_only(toys, tmp_path, jobs):
    """A cell that calls `os._exit`, among others, in real processes."""
    pool = Pool("loky", jobs)
    cells = [toy(gain=1.0), toy("Deadly", gain=2.0), *(toy(gain=float(gain)) for gain in range(3, 6))]
    with Store(tmp_path / "b.sqlite") as store:
        rows = run(cells, store, pool)
    assert [row.error is None for row in rows] == [True, False, True, True, True]
    assert rows[1].error.startswith("WorkerDied: ")
    assert os.getpid() not in {row.pid for row in rows}


CLUSTER = """
import json, os, sys
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import msgspec, ray
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
cluster.add_node(**small)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from refimpl.bench.cells import Cell
from refimpl.bench.engines import Pool
from refimpl.bench.runner import run
from refimpl.bench.store import Store
cells = msgspec.json.decode(sys.argv[2], type=list[Cell])
pool = Pool("ray")
with Store(Path(sys.argv[1])) as store:
    rows = run(cells, store, pool)
nodes = [node["NodeID"] for node in ray.nodes()]
Path(sys.argv[3]).write_text(json.dumps({"rows": msgspec.to_builtins(rows), "nodes": nodes, "jobs": pool.jobs}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same(toys, store, tmp_path):
    """Oracle: this process. Two nodes with a core each: a cell that fails or kills its actor is a row, and both nodes work."""
    pytest.importorskip("ray")
    import msgspec

    os.mkfifo(tmp_path / "pipe")
    cells = [
        toy("Meets", end=end, pipe=tmp_path / "pipe") for end in ("r", "w")
    ]  # only both nodes together can end them
    cells += [toy(gain=float(gain), seed=seed) for gain in range(3) for seed in range(2)] + [toy("Bad"), toy("Deadly")]
    variables = {**os.environ, "PYTHONPATH": f"{toys}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, store.path, msgspec.json.encode(cells).decode(), tmp_path / "said.json"],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())  # Ray itself tells of the dead actor on standard output
    assert said["jobs"] == 2
    finished = [row for row in said["rows"] if not row.get("error", "").startswith("WorkerDied")]
    assert {row["node"] for row in finished} == set(said["nodes"]) and len(said["nodes"]) == 2
    assert len({row["pid"] for row in finished}) >= 2
    here = outcomes(Pool("here"), cells[2:-1])
    for k, row in enumerate(said["rows"][2:-1]):
        assert (row["figures"], row.get("error")) == (here[str(k)].figures, here[str(k)].error)
    assert said["rows"][-1]["error"].startswith("WorkerDied: ")
