"""The mixers' arena: its texts, its figures by hand, and that a memory is what it takes."""

import pytest
import torch

from refimpl.architecture.alternatives.protocol import Mixer, linear
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
from refimpl.architecture.alternatives.state_space.mamba import Mamba
from refimpl.arena import mixers as arena
from refimpl.arena.protocol import Conditions


def conditions(pairs=4):
    torch.seed()  # PyTorch's global generator must not matter
    return Conditions(generator=torch.Generator().manual_seed(4), axes={"pairs": pairs}, quick=True)


@pytest.fixture
def short(monkeypatch):
    """A few steps, for what does not need a trained model."""
    for name, value in {"QUICK_STEPS": 10, "BATCH": 4, "TEXTS": 16, "LENGTH": 64}.items():
        monkeypatch.setattr(arena, name, value)


def test_answers_are_the_values_of_the_keys(generator):
    """Oracle: a dictionary of the pairs that the text states."""
    for row in arena.texts(20, 8, generator).tolist():
        stated = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(stated) == 8 and max(stated) < 16 <= min(stated.values())
        assert [stated[key] for key in row[16:24]] == row[24:]
        assert row[16:24] != row[0:16:2]  # another order


def test_figures_are_those_announced_and_repeat(short):
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (arena.baseline, lambda given: arena.measure(Mamba, {"d_state": 4}, given)):
        given = conditions()
        first, second = run(given), run(conditions())
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]
        curve = given.curves["accuracy over tokens"]
        assert [tokens for tokens, _ in curve] == [4 * 12 * n for n in range(1, 11)]


def test_bytes_and_parameters_by_hand(short):
    """Oracle: by hand. Two layers; keys and values of 32 numbers a token, or 64 channels of 3 inputs and 4 numbers of state."""
    dense, mamba = arena.baseline(conditions()), arena.measure(Mamba, {"d_state": 4}, conditions())
    assert dense["state_bytes"] == 2 * 64 * 2 * 32 * 4
    assert mamba["state_bytes"] == 2 * 64 * (3 + 4) * 4
    shared = 2 * 32 * 32 + 32 * 32 + 32  # tables, the token before, the last norm
    assert dense["parameters"] == shared + 2 * (32 + 4 * 32 * 32)


def test_all_train_on_the_same_number_of_tokens(short):
    """Oracle: by hand: 10 steps of 4 texts of 12 tokens, or 5 steps of 4 texts of 24."""
    for pairs in (4, 8):
        given = conditions(pairs)
        arena.figures(SoftmaxAttention(head_dim=16), given)
        assert given.curves["accuracy over tokens"][-1][0] == 480


def test_without_a_memory_nothing_is_recalled(short, monkeypatch):
    """Oracle: chance. A layer that sees one position can't do better than guess one of 16."""

    class Forgetful(Mixer):
        def __init__(self, generator):
            super().__init__()
            self.d_model, self.out_proj = 32, linear(32, 32, generator)

        def initial_state(self, batch):
            return torch.zeros(batch, 0)

        def extend(self, x, state):
            return self.out_proj(x).relu(), state

        def step(self, x, state):
            return self.out_proj(x).relu(), state

    class Method:
        def build(self, d_model, generator=None):
            return Forgetful(generator)

    monkeypatch.setattr(arena, "TEXTS", 512)
    figures = arena.figures(Method(), conditions(8))
    assert figures["accuracy"] < 0.12 and figures["state_bytes"] == 0


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="substrate is synthetic"):
        arena.baseline(Conditions(generator=torch.Generator(), axes={"pairs": 4}, model="somewhere"))
