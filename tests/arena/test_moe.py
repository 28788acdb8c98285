"""The arena of mixtures: figures by hand, balance and drops as the routing has them, equal text for all."""

from itertools import pairwise

import pytest
import torch

from refimpl.architecture.moe.decoder import FeedForward
from refimpl.architecture.moe.models.switch import Switch
from refimpl.arena import moe as arena
from refimpl.arena.protocol import Conditions

DENSE = 3 * 64 * 192  # parameters of one feed-forward


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A few steps on numbers that count up; no text is read."""

    def counting(given):
        return torch.arange(2000) % 50, torch.arange(700) % 50

    for name, value in {"QUICK_STEPS": 10, "BATCH": 4, "VOCABULARY": 61, "text": counting}.items():
        monkeypatch.setattr(arena, name, value)


def conditions():
    torch.seed()  # PyTorch's global generator must not matter
    return Conditions(generator=torch.Generator().manual_seed(4), quick=True)


def test_figures_are_those_announced_and_repeat():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (arena.baseline, lambda given: arena.measure(Switch, {"n_experts": 4}, given)):
        given = conditions()
        first, second = run(given), run(conditions())
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]
        curve = given.curves["loss over tokens"]
        assert [tokens for tokens, _ in curve] == [4 * 64 * n for n in range(1, 11)]
        assert curve[-1][1] < curve[0][1]


def test_parameters_by_hand():
    """Oracle: by hand. Four experts for one feed-forward; a token meets one of them, unless it is dropped."""
    dense, mixture = arena.baseline(conditions()), arena.measure(Switch, {"n_experts": 4}, conditions())
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert dense["parameters"] == dense["active_parameters"] == 61 * 64 + attention + 5 * 64 + 2 * DENSE
    assert mixture["parameters"] == dense["parameters"] + 3 * DENSE + 4 * 64
    kept = 1 - mixture["dropped"]
    assert mixture["active_parameters"] == pytest.approx(dense["parameters"] + 4 * 64 - (1 - kept) * DENSE)
    assert dense["fullest_expert"] == 1 and dense["dropped"] == 0


def test_balance_and_drops_by_hand():
    """Oracle: by hand. A router that sends all 24 tokens to one of three experts, which has 10 places."""
    layer = FeedForward(Switch(n_experts=3, jitter=0.0).build(4, 5, torch.Generator().manual_seed(0)))
    records = arena.Records()
    layer.train()(torch.ones(1, 24, 4))
    records.take(layer)
    assert (records.fullest, records.dropped) == (3.0, pytest.approx(14 / 24))
    assert arena.counts(layer, records)[1:] == (3 * 60, pytest.approx(60 * 10 / 24))


def test_held_out_loss_reads_each_window_on_its_own():
    """Oracle: by hand. A model that knows nothing has ln(61); what is left over is not read."""

    class Blind(torch.nn.Module):
        def forward(self, tokens):
            assert tokens.shape[1] == 64
            return torch.zeros(*tokens.shape, 61)

    assert arena.held_out_loss(Blind(), torch.arange(65 * 6 + 64) % 61) == pytest.approx(torch.tensor(61.0).log())


def test_learning_rate_rises_and_falls():
    rates = [arena.warm_and_decay(step / 100) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10) and rates[-1] < 0.02
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="substrate is synthetic"):
        arena.baseline(Conditions(generator=torch.Generator(), model="somewhere"))
