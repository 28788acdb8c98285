"""Data parallelism, the baseline: what the family's invariants do not say."""

import pytest

from refimpl.pretraining.system_level.data_parallel import DataParallel
from refimpl.processes import launch
from tests.pretraining.system_level.programs import one_process, train_many


def test_a_part_that_one_rank_uses_in_one_step():
    """Oracle: one process, in float64; the part's AdamW state starts in the second step, and decays from then on only."""
    expected, losses = one_process("sometimes")
    for (found,) in launch(train_many, 2, [(DataParallel(), "sometimes")]):
        assert found["losses"] == pytest.approx(losses, abs=1e-10)
        assert all((value - expected[name]).abs().max() < 1e-10 for name, value in found["whole"].items())


def test_configuration_is_checked():
    with pytest.raises(ValueError, match="micro_batches=0 must be at least 1"):
        DataParallel(micro_batches=0)
