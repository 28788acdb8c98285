"""FlexGenOffload as a server; answers under all budgets, plans within them, and what can go wrong with a disk."""

from collections import namedtuple

import pytest
import torch

from refimpl.inference.system_level.design import tiers
from refimpl.inference.system_level.design.flexgen_offload import FlexGenOffload, task_of
from refimpl.inference.system_level.design.offload_cost import footprint
from refimpl.inference.system_level.protocol import Request
from refimpl.inference.system_level.static_batching import StaticBatching
from tests.inference.system_level.traces import alone, trace


@pytest.mark.parametrize(("device", "cpu"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_answers_do_not_depend_on_where_things_lie(plain, generator, device, cpu):
    """Oracle: `generate`; with everything on disk, everywhere, in memory, or on the device."""
    requests = trace(generator)
    method = FlexGenOffload(slots=6, device=device, cpu=cpu)
    assert method.serve(plain, requests).tokens == [alone(plain, request) for request in requests]
    plan = method.plan(plain, requests)
    if (device, cpu) == (0.0, 0.0):
        assert plan.weights[2] > 0.9 and plan.cache[2] > 0.9
    if device == 1.0:
        assert plan.weights == pytest.approx((1.0, 0.0, 0.0)) and plan.cache == pytest.approx((1.0, 0.0, 0.0))


def test_plans_stay_within_the_budgets(plain, generator):
    """Oracle: shares times bytes, summed up here."""
    requests = trace(generator)
    task = task_of(plain, 23, 12, 6 * 25)
    for device, cpu in ((0.1, 0.2), (0.3, 0.4)):
        plan = FlexGenOffload(slots=6, device=device, cpu=cpu).plan(plain, requests)
        w, c, h = footprint(task, plan.batch, plan.block, streamed=True)[0, [0, 3, 6]]
        whole = footprint(task, 6, 6, streamed=True)[0, [0, 3, 6]].sum()
        held = [w * plan.weights[i] + c * plan.cache[i] + h * plan.activations[i] for i in range(3)]
        assert held[0] <= device * whole * (1 + 1e-9) and held[1] <= cpu * whole * (1 + 1e-9) and held[2] > 0


def test_passes_are_those_of_static_batching(plain, generator):
    """Oracle: static batching of as many slots: the block is a batch, read and decoded to its end."""
    requests = trace(generator, [(5, 7, 0), (2, 3, 0), (4, 6, 1), (3, 2, 1), (6, 5, 2)])
    method = FlexGenOffload(slots=4)
    assert method.plan(plain, requests).block == 4
    served, other = (x.serve(plain, requests) for x in (method, StaticBatching(slots=4)))
    for name in ("tokens", "admitted", "first", "ended", "running", "held", "used", "prefill_tokens"):
        assert getattr(served, name) == getattr(other, name)


def test_nothing_stays_on_the_disk(plain, generator, tmp_path):
    """Oracle: the folder, which is used meanwhile."""
    seen = []
    method = FlexGenOffload(device=0.0, cpu=0.0, folder=str(tmp_path))
    method.serve(plain, trace(generator), lambda _: seen.append(len(list(tmp_path.rglob("*")))))
    assert min(seen) > 4 and not list(tmp_path.iterdir())


def test_a_disk_without_room_or_folder_is_told(plain, tmp_path, monkeypatch):
    requests = [Request(prompt=(5,), n=2)]
    with pytest.raises(FileNotFoundError, match="absent"):
        FlexGenOffload(folder=str(tmp_path / "absent")).serve(plain, requests)
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(7))
    with pytest.raises(OSError, match="are to be put on this disk, and 7 are free"):
        FlexGenOffload(device=0.0, cpu=0.0, folder=str(tmp_path)).serve(plain, requests)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["device", "cpu"])
def test_shares_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}=1.5 is a share"):
        FlexGenOffload(**{name: 1.5})


def test_a_model_of_two_dtypes_is_refused(plain):
    plain.layers[1].feed_forward.to(torch.float64)
    with pytest.raises(ValueError, match="must have one dtype"):
        FlexGenOffload().serve(plain, [Request(prompt=(5,), n=2)])
