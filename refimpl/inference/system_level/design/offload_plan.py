r"""How to spread weights, caches and activations: the linear program over the cost model, for each size of batches and blocks.

Source: `flexgen` (arXiv 2303.06865), the section on policy search; official code FMInference/FlexGen@19753bc,
experimental/cost_model.py (`solve_lp`, `solve`).

Differs from the paper: the program is solved with buffers for weights that are streamed, and without them for $w_g = 1$. Of shares that take
as long those with the least traffic are taken. Sizes are powers of two and the largest there may be.

Not here: attention that the CPU computes; 4-bit weights and caches; sparse attention.
"""

import numpy as np

from refimpl.inference.system_level.design.offload_cost import (
    Hardware,
    Linear,
    Plan,
    Task,
    evaluate,
    footprint,
    streams,
)
from refimpl.inference.system_level.design.simplex import Infeasible, minimize

SLIGHT = 1e-6  # share of the time that a difference must exceed to count


def solve(task: Task, hardware: Hardware, batch: int, batches: int, *, beside: bool = False) -> Plan:
    r"""The best shares for a block, $\min T_{pre}\,l + T_{gen}\,(n - 1)\,l$ within the memories.

    Of shares that take as long, those with the least traffic.

    Args:
        task: sizes.
        hardware: memories and speeds.
        batch: sequences computed at once.
        batches: of a block.
        beside: whether memories are for what is spread alone, and buffers have room beside them.

    Raises:
        Infeasible: the memories together can't hold it.
    """
    best: Plan | None = None
    for streamed in (True,) if beside else (False, True):
        memory = footprint(task, batch, batch * batches, streamed)
        if beside:
            memory[1, 2] = memory[:, 9] = 0.0
        try:
            plan = _solve(task, hardware, batch, batches, memory, streamed)
        except Infeasible:
            continue
        if best is None or plan.seconds < best.seconds * (1 - SLIGHT):
            best = plan
    if best is None:
        raise Infeasible(
            f"no shares of {batches} batches of {batch} sequences fit into {hardware.device:.0f} bytes on the device, "
            f"{hardware.cpu:.0f} in CPU memory and {hardware.disk:.0f} on disk; buffers alone take {memory[0, 9]:.0f} on the "
            "device: give more memory, or ask for smaller batches"
        )
    return best


def _solve(task: Task, hardware: Hardware, batch: int, batches: int, memory: Linear, streamed: bool) -> Plan:
    passes = [streams(task, hardware, batch * batches, first) for first in (True, False)]
    unit = max(float(rows.max()) for rows in passes)  # of time, so that all numbers are of a size
    upper, right = np.zeros((13, 11)), np.zeros(13)
    for i, rows in enumerate(passes):
        upper[5 * i : 5 * i + 5, :9], upper[5 * i : 5 * i + 5, 9 + i] = rows[:, :9] / unit, -1.0
        right[5 * i : 5 * i + 5] = -rows[:, 9] / unit
    upper[10:, :9], right[10:] = memory[:, :9], np.array([hardware.device, hardware.cpu, hardware.disk]) - memory[:, 9]
    equal = np.zeros((3 if streamed else 4, 11))
    for i in range(3):
        equal[i, 3 * i : 3 * i + 3] = 1.0
    if not streamed:
        equal[3, 0] = 1.0
    cost = np.concatenate((np.zeros(9), [1.0, task.new - 1.0]))
    for i in range(2):
        cost[:9] += SLIGHT * cost[9 + i] * passes[i][:, :9].sum(axis=0) / unit
    x = minimize(cost, (upper, right), (equal, np.ones(len(equal))))
    return evaluate(task, hardware, batch, batches, x[:9].clip(max=1.0))


def search(task: Task, hardware: Hardware, most: int, *, beside: bool = False) -> Plan:
    """The plan with the most sequences a second; sizes of batches and blocks are enumerated.

    Args:
        task: sizes.
        hardware: memories and speeds.
        most: sequences of a block at most; batches have four or more of them, as the paper says, if so many fit, else fewer.
        beside: as for `solve`.

    Raises:
        Infeasible: not even one sequence at a time fits.
    """
    best: Plan | None = None
    refused: Infeasible | None = None
    sizes = _sizes(most)
    for some in ([size for size in sizes if size >= 4], [size for size in sizes[::-1] if size < 4]):
        for batch in some:
            for batches in _sizes(most // batch):
                try:
                    plan = solve(task, hardware, batch, batches, beside=beside)
                except Infeasible as error:
                    refused = error  # at last that of one sequence
                    break  # nor does a larger block fit
                if best is None or plan.block / plan.seconds > best.block / best.seconds * (1 + SLIGHT):
                    best = plan
        if best is not None:
            return best
    raise refused or Infeasible(f"most={most} must be at least 1")


def _sizes(most: int) -> list[int]:
    """Powers of two, and the largest there may be."""
    return sorted({2**i for i in range(most.bit_length())} | ({most} if most else set()))
