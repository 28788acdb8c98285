"""The fine-tuning arena: its task, and that every method meets the same one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from refimpl.arena import finetuning as arena
from refimpl.arena.protocol import Conditions
from refimpl.finetuning.peft.lora.lora import LoRA

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch):
    """A few steps, for what does not need a trained model."""
    monkeypatch.setattr(arena, "PRETRAINING_STEPS", 3)
    monkeypatch.setattr(arena, "STEPS", 5)


def seeded():
    torch.seed()  # PyTorch's global generator must not matter
    return torch.Generator().manual_seed(4)


def test_labels_are_the_best_scored_tokens(short):
    """Oracle: the rule written out, token by token."""
    tables = torch.randn(2, 16, 16, generator=seeded())
    data = arena._draw(tables, 3, seeded(), CPU)
    for tokens, labels in zip(data.inputs.tolist(), data.labels.tolist(), strict=True):
        assert labels == [int((tables[0][this] + tables[1][before]).argmax()) for before, this in pairwise(tokens)]


def test_figures_are_those_announced_and_repeat(short):
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (
        lambda: arena.baseline(Conditions(seeded())),
        lambda: arena.measure(LoRA, {"rank": 2}, Conditions(seeded())),
    ):
        first, second = run(), run()
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]


def test_parameters_and_bytes_by_hand(short):
    """Oracle: by hand. Two layers, queries and values, factors of 64 x 2 and 2 x 64; AdamW keeps two numbers for each
    and a step count a tensor, in float32."""
    figures = arena.measure(LoRA, {"rank": 2}, Conditions(seeded()))
    assert figures["trained_parameters"] == 2 * 2 * 2 * 64 * 2
    assert figures["optimizer_bytes"] == 4 * (2 * 1024 + 8)


def test_methods_meet_the_same_substrate_and_leave_it_as_it_was(short):
    """Oracle: a second draw from the seed."""
    first, second = (arena.substrate(seeded(), CPU) for _ in range(2))
    arena.figures(first, LoRA(rank=2))
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert torch.equal(first.test.inputs, second.test.inputs) and first.seed == second.seed
    assert not torch.equal(first.test.inputs, first.train.inputs[: len(first.test.inputs)])


@pytest.mark.parametrize("rates", [(1e-9, 1e-2), (1e-2, 1e-9)])
def test_the_better_learning_rate_counts(short, monkeypatch, rates):
    """Oracle: a rate that moves nothing leaves the model where it was."""
    monkeypatch.setattr(arena, "STEPS", 40)
    given = arena.substrate(seeded(), CPU)
    monkeypatch.setattr(arena, "LEARNING_RATES", rates)
    assert arena.figures(given, arena.FullFineTuning())["accuracy"] > arena._accuracy(given.model, given.test) + 0.1


def test_the_loss_is_a_curve_over_the_steps_and_quick_has_fewer(monkeypatch):
    """Oracle: by hand; every fifth of 20 and of 15 steps. The loss starts near that of task A's model and falls."""
    monkeypatch.setattr(arena, "STEPS", 20)
    monkeypatch.setattr(arena, "QUICK_STEPS", 15)
    for quick, steps in ((False, [5, 10, 15, 20]), (True, [5, 10, 15])):
        conditions = Conditions(seeded(), quick=quick)
        arena.measure(LoRA, {"rank": 4}, conditions)
        [points] = conditions.curves.values()
        assert [step for step, _ in points] == steps
        assert points[0][1] > points[-1][1] > 0


def test_a_model_is_refused():
    with pytest.raises(ValueError, match="substrate is synthetic"):
        arena.baseline(Conditions(seeded(), model=Path("here")))
