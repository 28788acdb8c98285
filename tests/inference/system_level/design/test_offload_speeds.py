"""Constants of the cost model, found again on a machine that is made up here."""

from collections import namedtuple

import pytest
import torch

from refimpl.inference.system_level.design import offload_speeds, tiers
from refimpl.inference.system_level.design.offload_cost import Hardware, Task, evaluate

TASK = Task(
    layers=2, weights=6_400, entry=64, feature=80, parameters=1_600, attended=16, heads=2, inner=100, itemsize=4, resident=500,
    prompt=6, new=5,
)  # fmt: skip
RATES = {"cpu_to_device": 500.0, "device_to_cpu": 400.0, "disk_to_cpu": 50.0, "cpu_to_disk": 40.0}


@pytest.fixture
def machine(monkeypatch):
    """Its clock. Links have the rates above, products take 1/7000 s an operation of many tokens and 1/300 s of few; the first of each kind takes
    a hundred times as long.
    """
    now, seen = [0.0], set()

    def taking(owner, name, seconds):
        plain = getattr(owner, name)

        def slow(*given):
            kind = name, seconds(*given)
            now[0] += kind[1] * (1 if kind in seen else 100)
            seen.add(kind)
            return plain(*given)

        monkeypatch.setattr(owner, name, slow)

    def link(spread, slower, faster):
        return sum(spread.nbytes) / RATES[slower if spread.nbytes[2] else faster]

    taking(tiers.Spread, "read", lambda spread, *_: link(spread, "disk_to_cpu", "cpu_to_device"))
    taking(tiers.Spread, "write", lambda spread, *_: link(spread, "cpu_to_disk", "device_to_cpu"))
    taking(tiers.SpreadWeights, "load", lambda weights, _: weights.nbytes[2] / RATES["disk_to_cpu"])
    taking(offload_speeds.F, "linear", lambda x, w: 2 * len(x) * w.numel() / (7000 if len(x) > 4 else 300))
    return lambda: now[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_machines_rates_are_found_again(machine, dtype, tmp_path):
    """Oracle: the rates of the machine above, and by hand what it takes with all on disk: in a pass 6,400 bytes of weights and so on at 50 bytes a
    second. The first, slow, time of an operation does not count.
    """
    found = offload_speeds.speeds(TASK, 3, torch.zeros(1, dtype=dtype), tmp_path, machine)
    assert found == pytest.approx(RATES | {"prefill_flops": 7000, "decode_flops": 300})
    assert not list(tmp_path.iterdir())
    hardware = Hardware(device=0, cpu=0, disk=0, **found)
    plan = evaluate(TASK, hardware, 3, 1, (0, 0, 1, 1, 0, 0, 1, 0, 0))
    compute = [3 * 6 * (2 * 1600 + 4 * 6 * 16) / 7000, 3 * (2 * 1600 + 4 * 8.5 * 16) / 300]
    assert plan.seconds == pytest.approx(2 * sum(k * max(6400 / 50, c) for k, c in zip((1, 4), compute, strict=True)))


def test_this_machine_has_rates(tmp_path):
    """Control: the machine at hand, by its own clock: all are found, and the device's own memory is no link of a made-up speed."""
    found = offload_speeds.speeds(TASK, 3, torch.zeros(1), tmp_path)
    assert list(found) == [*RATES, "prefill_flops", "decode_flops"] and min(found.values()) > 0


def test_a_clock_that_stands_still_is_no_error():
    assert offload_speeds.speeds(TASK, 3, torch.zeros(1), clock=lambda: 0.0)["disk_to_cpu"] == pytest.approx(6400e9)


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(7))
    with pytest.raises(OSError, match="are to be put on this disk, and 7 are free"):
        offload_speeds.speeds(TASK, 3, torch.zeros(1), tmp_path)
    assert not list(tmp_path.iterdir())
