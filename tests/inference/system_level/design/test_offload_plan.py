"""The plan against all others on a grid, and against fixed rules."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from refimpl.inference.system_level.design.offload_cost import Hardware, Task, footprint, streams
from refimpl.inference.system_level.design.offload_plan import search, solve
from refimpl.inference.system_level.design.simplex import Infeasible


def small(memory=1.0):
    """A task, and memories that hold a part of it on the device and in CPU memory."""
    task = Task(
        layers=6, weights=4_000, entry=64, feature=64, parameters=1_000, attended=16, heads=2, inner=100, itemsize=4, resident=500,
        prompt=6, new=5,
    )  # fmt: skip
    speeds = {"cpu_to_device": 4e4, "device_to_cpu": 3e4, "disk_to_cpu": 1e4, "cpu_to_disk": 8e3}
    return task, Hardware(
        device=24_000 * memory, cpu=20_000 * memory, disk=1e6, **speeds, prefill_flops=1e7, decode_flops=1e6
    )


def test_no_point_of_a_grid_is_better():
    """Oracle: brute force over 3,375 plans in steps of a quarter, of which those that fit; the plan fits, its shares sum to 1."""
    task, hardware = small()
    quarters = [p for p in itertools.product(np.arange(5) / 4, repeat=3) if sum(p) == 1]
    grid = np.array([[*w, *c, *h, 1.0] for w, c, h in itertools.product(quarters, repeat=3)])
    limits = np.array([hardware.device, hardware.cpu, hardware.disk])
    compared = 0
    for batch, batches in ((4, 1), (4, 2), (2, 8)):
        plan = solve(task, hardware, batch, batches)
        assert (np.array(plan.bytes) <= limits * (1 + 1e-9)).all()
        for shares in (plan.weights, plan.cache, plan.activations):
            assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0
        first, later = ((streams(task, hardware, batch * batches, one) @ grid.T).max(axis=0) for one in (True, False))
        seconds = task.layers * (first + (task.new - 1) * later)
        held = footprint(task, batch, batch * batches, streamed=True) @ grid.T
        fits = (held <= limits[:, None]).all(axis=0)
        assert plan.seconds <= seconds[fits].min() * (1 + 1e-5)  # the least traffic weighs a millionth
        assert plan.seconds > seconds.min()  # control: without the limits something is better
        compared += int(fits.sum())
    assert compared > 100


@pytest.mark.parametrize("new", [1, 3, 5])
def test_no_bytes_are_better_moved(new):
    """Oracle: brute force: the program is convex, so that what none of 117,649 small moves between memories betters is its best."""
    task, hardware = replace(small()[0], new=new), small()[1]
    plan, rows = solve(task, hardware, 4, 1), footprint(task, 4, 4, streamed=True)
    pairs = np.array(list(itertools.product(range(-3, 4), repeat=2)))
    moves = 5.0 * np.concatenate((pairs, -pairs.sum(axis=1, keepdims=True)), axis=1)  # bytes of one kind
    chosen = np.indices((len(moves),) * 3).reshape(3, -1)
    moved = np.concatenate([moves[of] for of in chosen], axis=1) / np.repeat(rows[0, [0, 3, 6]], 3)
    points = np.array([*plan.weights, *plan.cache, *plan.activations, 1.0]) + np.pad(moved, ((0, 0), (0, 1)))
    limits = np.array([hardware.device, hardware.cpu, hardware.disk])
    fits = (points >= -1e-9).all(axis=1) & (rows @ points.T <= limits[:, None] * (1 + 1e-9)).all(axis=0)
    first, later = ((streams(task, hardware, 4, one) @ points[fits].T).max(axis=0) for one in (True, False))
    seconds = task.layers * (first + (new - 1) * later)
    assert len(seconds) > 1000 and seconds.min() > plan.seconds * (1 - 1e-5)


def test_more_memory_is_never_slower_and_too_little_is_refused():
    """Oracle: the set of plans grows with the memories."""
    task, _ = small()
    seconds = [solve(task, small(memory)[1], 4, 2).seconds for memory in (1.0, 1.2, 1.5, 3.0, 10.0)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 1.5 * seconds[-1]
    everything = solve(task, small(10.0)[1], 4, 2)
    for shares in (everything.weights, everything.cache, everything.activations):
        assert shares == pytest.approx((1.0, 0.0, 0.0))  # no traffic, though computing takes longer than some
    with pytest.raises(
        Infeasible, match=r"no shares of 2 batches of 4 sequences fit into 240 bytes.*buffers alone take \d+"
    ):
        solve(task, small(0.01)[1], 4, 2)
    with pytest.raises(Infeasible, match="no shares of 1 batches of 1"):
        search(task, small(0.01)[1], 8)


def test_the_search_finds_the_best_of_all_sizes():
    """Oracle: every size there is, one by one; batches of four or more, unless so many do not fit."""
    task, hardware = small()
    best = search(task, hardware, 8)
    rates = []
    for batch, batches in itertools.product((4, 8), (1, 2)):
        if (batch, batches) == (8, 1):
            with pytest.raises(Infeasible):
                solve(task, hardware, batch, batches)
        elif batch * batches <= 8:
            plan = solve(task, hardware, batch, batches)
            rates.append(plan.block / plan.seconds)
    assert best.block / best.seconds == pytest.approx(max(rates)) and best.batch >= 4
    tight = replace(hardware, device=13_500.0)  # no batch of four fits; two at once are faster than one
    few = [solve(task, tight, batch, batches) for batch, batches in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))]
    best = search(task, tight, 8)
    assert best.block / best.seconds == pytest.approx(max(plan.block / plan.seconds for plan in few))
    assert (best.batch, best.batches) == (2, 2)


def test_buffers_may_have_room_beside():
    """Oracle: shares times bytes: memories hold what is spread and no more, though buffers alone are larger."""
    task, hardware = small()
    spread = footprint(task, 4, 8, streamed=True)[0, [0, 3, 6]]
    tight = replace(hardware, device=0.2 * spread.sum(), cpu=0.1 * spread.sum())
    plan = solve(task, tight, 4, 2, beside=True)
    held = [float(spread @ [plan.weights[i], plan.cache[i], plan.activations[i]]) for i in range(3)]
    assert held == pytest.approx([tight.device, tight.cpu, 0.7 * spread.sum()])
    assert plan.weights[2] > 0.1  # a layer of which passes through CPU memory
    assert plan.bytes[0] > tight.device
    with pytest.raises(Infeasible):
        solve(task, tight, 4, 2)
