r"""The constants of the cost model, measured on the machine at hand by the operations that a block is made of.

Source: `flexgen` (arXiv 2303.06865), the sections on the cost model and the policy search: constants are fitted to what was profiled beforehand;
official code FMInference/FlexGen@19753bc, experimental/fit_cost_model.py.

Differs from the paper: each operation is timed by itself at one size, a layer's weights on the links, and a product with a matrix of as many
numbers for operations a second; the code fits all constants at once to the times of whole runs. What goes to disk or comes from there
passes both links in one step, as it does in `tiers`, and what was written is read again out of the system's memory, as by a block that has
room there: a disk is then as fast as that, whatever it is made of.

Not here: links that several streams use at once; a fit of each kernel's own speed.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.inference.system_level.design.offload_cost import Task
from refimpl.inference.system_level.design.tiers import Spread, SpreadWeights

TIMES = 5  # that each operation is timed, after one that is not
SHORTEST = 1e-9  # seconds of a step during which the clock did not go on


@torch.no_grad()
def speeds(
    task: Task, batch: int, like: Tensor, folder: Path | None = None, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """What `offload_cost.Hardware` takes beside the sizes of its memories.

    Args:
        task: sizes of a layer and of a prompt.
        batch: sequences computed at once.
        like: a tensor of the dtype and on the device that are wanted.
        folder: on the disk that is to be used; None takes the system's for temporary files.
        clock: in seconds.

    Returns:
        Bytes a second of each link, operations a second with the tokens of the prompts and with one of each sequence; medians.

    Raises:
        OSError: the disk has no room for the weights of two layers.

    Examples:
        A clock that goes on by a second whenever it is looked at, and a layer of 1,024 parameters:

        >>> from itertools import count
        >>> from refimpl.inference.system_level.design.offload_cost import Hardware
        >>> sizes = {"layers": 6, "weights": 4096, "entry": 64, "feature": 64, "parameters": 1024, "attended": 16, "heads": 2}
        >>> task = Task(**sizes, inner=100, itemsize=4, resident=500, prompt=6, new=5)
        >>> found = speeds(task, 4, torch.zeros(1), clock=count().__next__)
        >>> found["disk_to_cpu"], found["decode_flops"]  # 2 * 4 * 1024
        (4096.0, 8192.0)
        >>> Hardware(device=1e6, cpu=1e6, disk=1e9, **found).cpu_to_disk
        4096.0
    """
    row = like.new_ones(1, task.weights // task.itemsize)
    room, width = torch.empty_like(row), task.feature // task.itemsize
    matrix = like.new_ones(task.parameters // width, width)
    prompts, tokens = (like.new_ones(batch * time, width) for time in (task.prompt, 1))

    def seconds(step: Callable[[], object]) -> float:
        taken = []
        for _ in range(TIMES + 1):
            start = _now(clock, like.device)
            step()
            taken.append(_now(clock, like.device) - start)
        return max(statistics.median(taken[1:]), SHORTEST)

    with tempfile.TemporaryDirectory(dir=folder) as name:
        file, traffic = Path(name), Counter[str]()
        cpu, disk = (
            Spread(1, row.shape[1], shares, like, file / "row", traffic)
            for shares in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        )
        weights = SpreadWeights({"row": row[0]}, (0.0, 0.0, 1.0), like.device, file / "weights.safetensors", traffic)
        found = {
            "cpu_to_device": row.nbytes / seconds(lambda: cpu.read(0, 1, room)),
            "device_to_cpu": row.nbytes / seconds(lambda: cpu.write(0, row)),
            "disk_to_cpu": row.nbytes / seconds(lambda: weights.load(room[0])),
            "cpu_to_disk": row.nbytes / seconds(lambda: disk.write(0, row)),
        }
        disk.close()
    for name, x in (("prefill_flops", prompts), ("decode_flops", tokens)):
        found[name] = 2 * len(x) * matrix.numel() / seconds(lambda x=x: F.linear(x, matrix))  # type: ignore[misc]
    return found


def _now(clock: Callable[[], float], device: torch.device) -> float:
    """The clock, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
