"""The cost model against formulas written out for OPT, and the memory that models take."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.inference.system_level.design.offload_cost import evaluate, footprint, streams
from tests.inference.system_level.design.opt import OPT_30B, SHARES, T4


def test_streams_are_the_formulas():
    """Oracle: the official code's formulas for OPT, written out as scalars, with links' constants made one and the cache's mean exact."""
    h, s, n, b = 7168, 512, 32, 24
    _, wc, wn, _, cc, cn, _, hc, hn = SHARES
    wi = 8 * h**2 + 4 * h * 4 * h
    first = [
        (wi * (wc + wn) + 2 * s * h * b * (hc + hn)) / T4.cpu_to_device,
        (4 * s * h * b * (cc + cn) + 2 * s * h * b * (hc + hn)) / T4.device_to_cpu,
        (wi * wn + 2 * s * h * b * hn) / T4.disk_to_cpu,
        (4 * b * s * h * cn + 2 * s * h * b * hn) / T4.cpu_to_disk,
        b * (8 * s * h**2 + 4 * s * h * 4 * h + 4 * s**2 * h) / T4.prefill_flops,
    ]
    past = 4 * h * b * (s + (n - 2) / 2)
    later = [
        (wi * (wc + wn) + past * (cc + cn) + 2 * h * b * (hc + hn)) / T4.cpu_to_device,
        (4 * h * b * (cc + cn) + 2 * h * b * (hc + hn)) / T4.device_to_cpu,
        (wi * wn + past * cn + 2 * h * b * hn) / T4.disk_to_cpu,
        (4 * h * b * cn + 2 * h * b * hn) / T4.cpu_to_disk,
        b * (8 * h**2 + 4 * h * 4 * h + 4 * (s + n / 2) * h) / T4.decode_flops,
    ]
    for expected, one in ((first, True), (later, False)):
        assert streams(OPT_30B, T4, b, one) @ np.array([*SHARES, 1.0]) == pytest.approx(expected, rel=1e-12)
    plan = evaluate(OPT_30B, T4, 8, 3, SHARES)
    assert plan.seconds == pytest.approx(48 * max(first) + 48 * 31 * max(later))


def test_the_mean_of_the_cache_is_exact():
    """Oracle: entries that pass i = 1 ... n - 1 reads, s + i - 1, summed up."""
    task = replace(OPT_30B, prompt=7, new=5)
    rows = streams(task, T4, 3, first=False)
    assert 4 * rows[0, 4] * T4.cpu_to_device == pytest.approx(sum(3 * (7 + i - 1) * task.entry for i in range(1, 5)))


def test_numbers_are_checked():
    for name, value in (("device", -1.0), ("disk_to_cpu", 0.0), ("cpu", float("nan"))):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            replace(T4, **{name: value})


def test_bytes_held_are_those_by_hand():
    """Oracle: by hand, for OPT-30B at 24 sequences in batches of 8: homes by share, buffers, and a layer's weights on their way from disk."""
    w, c, h = 48 * 24 * 7168**2, 48 * 24 * 543 * 4 * 7168, 24 * 512 * 2 * 7168
    device, cpu, disk = footprint(OPT_30B, 8, 24, streamed=True) @ np.array([*SHARES, 1.0])
    rounding = 2 * (48 * (2 + 2 * 3 * 543) + 2 * 3 * 512)
    buffers = 2 * w / 48 + 2 * 50272 * 7168 + 8 * 543 * 4 * 7168 + 8 * 512 * (18 * 7168 + 56 * 512 * 2)
    assert device == pytest.approx(0.2 * w + 0.1 * c + 0.0 * h + buffers + rounding)
    assert cpu == pytest.approx(0.5 * w + 0.7 * c + 0.6 * h + 0.3 * w / 48 + rounding)
    assert disk == pytest.approx(0.3 * w + 0.2 * c + 0.4 * h + rounding)
    whole = footprint(OPT_30B, 8, 24, streamed=False)[0, 9]
    assert footprint(OPT_30B, 8, 24, streamed=True)[0, 9] - whole == pytest.approx(2 * w / 48)
    assert replace(OPT_30B, entries=1000).cached(24) == 1000 and OPT_30B.cached(24) == 24 * 543
