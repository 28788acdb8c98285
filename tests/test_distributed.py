"""Exchanges between processes: values by hand, bytes as the kernel counts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refimpl.processes import launch
from tests.process_programs import exchanges

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel's count of bytes is read there")
COUNT = 120_000  # divisible by 2, 3 and 4


@pytest.mark.parametrize("size", [2, 3, 4])
def test_values_and_bytes(size):
    """Oracle: sums and places by hand; bytes that the kernel saw each process write, headers of under 2 KB included."""
    results = launch(exchanges, size, COUNT)
    part = COUNT // size
    ranks = [torch.arange(float(COUNT)) + 1000 * rank for rank in range(size)]
    for rank, found in enumerate(results):
        values = {kind: value for kind, (value, _, _) in found.items()}
        mine = slice(rank * part, (rank + 1) * part)
        assert torch.equal(values["all_reduce"], sum(ranks))
        assert torch.equal(values["reduce_scatter"], sum(ranks)[mine])
        assert torch.equal(values["all_gather"], torch.cat([x[:part] for x in ranks]))
        assert torch.equal(values["all_to_all"], torch.cat([x[mine] for x in ranks]))
        assert torch.equal(values["broadcast"], ranks[-1])
        assert rank != 1 or torch.equal(values["send"], ranks[0])
        for kind, (_, counted, seen) in found.items():
            assert 0 <= seen - counted < 2000, (kind, rank, counted, seen)
        assert found["all_reduce"][1] == 2 * found["reduce_scatter"][1] == 2 * 4 * COUNT * (size - 1) // size


def test_unequal_parts_are_refused():
    with pytest.raises(RuntimeError, match="7 rows can't be cut into 2 equal parts; pad it"):
        launch(exchanges, 2, 7)


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """Oracle: by hand, 1 + 2 = 3 on both ranks."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom refimpl.distributed import joined\n"
        "with joined() as group:\n"
        f"    open(r'{tmp_path}/' + str(group.rank), 'w').write(str(group.all_reduce(torch.ones(1) + group.rank).item()))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0", "3.0"]
