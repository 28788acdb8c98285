"""What holds for every method that trains on several processes; the list of methods is the taxonomy's, and the baseline."""

import itertools

import pytest
import torch
from torch.testing import assert_close

import taxonomy
from refimpl.pretraining.system_level.data_parallel import DataParallel
from refimpl.pretraining.system_level.protocol import bytes_of, state_tensors
from refimpl.processes import launch
from tests.pretraining.system_level.programs import MODELS, one_process, train_many

METHODS = taxonomy.load().find(category="pretraining/system_level", implemented=True)


def every_setting(method):
    """All settings of a method's grid in the arena."""
    grid = method.arena["distributed"]
    return [method.load()(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]


CONFIGURED = [DataParallel(), DataParallel(micro_batches=2), *(c for m in METHODS for c in every_setting(m))]
MODELS_OF_ALL = ["awkward", "decoder"]


@pytest.fixture(scope="module", params=[1, 2, 3])
def trained(request):
    """All methods on both models by 1, 2 and 3 ranks: one launch each."""
    jobs = list(itertools.product(CONFIGURED, MODELS_OF_ALL))
    return request.param, dict(zip(jobs, zip(*launch(train_many, request.param, jobs), strict=True), strict=True))


def test_there_are_methods():
    assert METHODS and set(MODELS_OF_ALL) < set(MODELS)


def test_equals_one_process(trained):
    """Oracle: plain PyTorch in this process on the whole batches, in float64, to 1e-10."""
    for (method, name), ranks in trained[1].items():
        expected, losses = one_process(name)
        assert any((expected[n] - p).abs().max() > 0.01 for n, p in MODELS[name]().named_parameters())  # it moved
        for rank in ranks:
            assert rank["losses"] == pytest.approx(losses, abs=1e-10), (method, name)
            assert set(rank["whole"]) == set(expected)
            for parameter, value in rank["whole"].items():
                assert_close(
                    value, expected[parameter].detach(), rtol=0, atol=1e-10, msg=f"{method} {name} {parameter}"
                )


def test_ranks_agree_bit_by_bit(trained):
    """Oracle: rank 0."""
    for ranks in trained[1].values():
        for rank in ranks[1:]:
            assert rank["losses"] == ranks[0]["losses"]
            assert all(torch.equal(rank["whole"][name], value) for name, value in ranks[0]["whole"].items())


def test_the_model_computes_between_steps_and_after(trained):
    """Oracle: the closed run's plain model."""
    for ranks in trained[1].values():
        for rank in ranks:
            assert_close(rank["outputs"], rank["again"])
            assert torch.isfinite(rank["again"]).all()
            assert all(torch.equal(rank["closed"][name], value) for name, value in rank["whole"].items())


def test_closing_leaves_nothing_behind(trained):
    """Oracle: the plain model's modules; memory of each parameter is its own."""
    for ranks in trained[1].values():
        assert all(rank["hooks"] == 0 and rank["own memory"] for rank in ranks)


def test_bytes_of_counts_memory_once():
    """Oracle: by hand, 12 floats."""
    x = torch.zeros(3, 4)
    assert bytes_of([x, x[0], x.T, x.detach()]) == 48


def test_state_tensors_by_hand():
    """Oracle: by hand. Adam: two moments and a count of steps."""
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([weight])
    assert state_tensors(optimizer) == []
    weight.grad = torch.ones(5)
    optimizer.step()
    assert sorted(state.numel() for state in state_tensors(optimizer)) == [1, 5, 5]
