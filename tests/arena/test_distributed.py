"""The arena of distributed training: bytes by hand, and figures that repeat."""

import pytest
import torch

from refimpl.arena import distributed as arena
from refimpl.arena.protocol import Conditions
from refimpl.pretraining.system_level.zero import ZeRO


def conditions(processes=2):
    """With seed 4, one gradient lies within float32's rounding of 0, and Adam takes its sign for a step: a difference of 1e-3."""
    return Conditions(generator=torch.Generator().manual_seed(1), axes={"processes": processes}, quick=True)


@pytest.fixture(scope="module")
def rows():
    """Figures of the baseline and of two stages; the baseline twice."""
    return {
        "baseline": arena.baseline(conditions()),
        "again": arena.baseline(conditions()),
        1: arena.measure(ZeRO, {"stage": 1}, conditions()),
        3: arena.measure(ZeRO, {"stage": 3}, conditions()),
    }


def test_figures_are_those_announced_and_repeat(rows):
    """Oracle: itself from the same seed."""
    assert all(list(row) == [metric.name for metric in arena.METRICS] for row in rows.values())
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    assert [rows["baseline"][name] for name in exact] == [rows["again"][name] for name in exact]


def test_bytes_by_hand(rows):
    """Oracle: arithmetic on the decoder's shape, in float32; AdamW's states are two numbers a parameter and a count a tensor."""
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 172 + 2 * 64
    n = 256 * 64 + 2 * block + 64
    assert rows["baseline"]["parameter_bytes"] == rows["baseline"]["gradient_bytes"] == 4 * n
    assert rows["baseline"]["state_bytes"] == 8 * n + 4 * (2 + 2 * 9)
    assert rows["baseline"]["sent_bytes"] == pytest.approx(2 * 4 * n / 2, rel=0.01)
    assert rows[1]["state_bytes"] == pytest.approx(8 * n / 2, rel=0.01)
    assert rows[1]["parameter_bytes"] == rows[1]["gradient_bytes"] == 4 * n
    for kind in ("parameter_bytes", "gradient_bytes", "state_bytes"):
        assert rows[3][kind] == pytest.approx(rows["baseline"][kind] / 2, rel=0.01)


def test_all_train_the_same_model(rows):
    """Oracle: one process in float32; Adam's step is the gradient's sign where that is near 0, so that rounding shows."""
    assert all(row["difference"] < 1e-3 for row in rows.values())
    assert rows[3]["passing_bytes"] > 0


def test_a_wrong_sum_would_show(monkeypatch):
    """Negative control: a loss of other batches makes a difference as large as the change."""
    alone = arena.alone
    monkeypatch.setattr(arena, "alone", lambda model, tokens: alone(model, tokens.flip(2)))
    assert arena.baseline(conditions())["difference"] > 0.1


def test_a_model_is_refused(tmp_path):
    given = Conditions(generator=torch.Generator(), axes={"processes": 2}, model=tmp_path)
    with pytest.raises(ValueError, match="substrate is synthetic"):
        arena.baseline(given)
