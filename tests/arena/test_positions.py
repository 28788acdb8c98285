"""The arena of positions: its texts, its facts, its baseline, and that every method meets the same substrate."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from refimpl.architecture.long_context.positions.protocol import NoPositions, Positions
from refimpl.arena import positions as arena
from refimpl.arena.protocol import Conditions
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import Rotary

VOCABULARY = 128 + 4 * 8 + 4 + 8


@pytest.fixture
def short(monkeypatch):
    """A few steps on a made-up text, for what needs no trained model."""
    made_up = torch.randint(128, (5000,), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(arena, "characters", lambda split, n: made_up[: min(n, 5000)])
    monkeypatch.setattr(arena, "QUICK_STEPS", 10)
    monkeypatch.setattr(arena, "TEXT", 4 * 1025)
    monkeypatch.setattr(arena, "ROWS", 4 * 3)


def seeded(quick=True):
    torch.seed()  # PyTorch's global generator must not matter
    return Conditions(generator=torch.Generator().manual_seed(4), quick=quick)


def small(generator, config=None):
    config = config or Config(
        vocabulary=VOCABULARY, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24, max_positions=64
    )
    return initialize_(Decoder(config), generator, std=0.3)


@pytest.mark.parametrize("time", [12, 13, 64, 512])
def test_facts_are_stated_once_and_asked_once(time, generator):
    """Oracle: the rules, read back token by token."""
    text = torch.randint(128, (5, time), generator=generator)
    rows = arena.facts(text, VOCABULARY, generator)
    assert rows.shape == text.shape
    for before, row in zip(text.tolist(), rows.tolist(), strict=True):
        body, end = row[:-8], row[-8:]
        stated = {(t - 128) // 8: (t - 128) % 8 for t in body if t >= 128}
        assert sum(t >= 128 for t in body) == 4 and sorted(stated) == [0, 1, 2, 3]
        assert {q - 160: a - 164 for q, a in zip(end[::2], end[1::2], strict=True)} == stated
        assert all(t == b for t, b in zip(body, before, strict=False) if t < 128)
    if time == 512:
        at = (rows[:, :-8] >= 128).nonzero()[:, 1]
        assert at.min() < 150 and at.max() > 350  # anywhere
        assert len({tuple(row[-8::2].tolist()) for row in rows}) > 1  # in random order


def test_loss_is_that_of_each_window(generator):
    """Oracle: windows one by one; a length that does not divide the text leaves the rest out."""
    model, text = small(generator), torch.randint(128, (100,), generator=generator)
    with torch.no_grad():
        parts = [cross_entropy(model(text[None, i : i + 33])[0], text[i + 1 : i + 34]) for i in (0, 33, 66)]
    assert arena.loss(model, text, 33) == pytest.approx(sum(parts).item() / 3, rel=1e-5)
    assert arena.loss(model, text[:99], 33) != pytest.approx(sum(parts).item() / 3, rel=1e-5)


def test_recall_counts_what_is_told(generator):
    """Oracle: models that tell always the same value, and the right one by looking it up."""
    text = torch.randint(128, (300,), generator=generator)

    class Fixed:
        config = small(generator).config

        def hidden(self, rows):
            self.rows = rows
            return rows.unsqueeze(-1)

        def logits(self, hidden):
            return torch.nn.functional.one_hot(torch.full(hidden.shape[:2], VOCABULARY - 8), VOCABULARY).float()

    class Right(Fixed):
        def logits(self, hidden):
            key = hidden[..., 0] - 160
            stated = torch.where((self.rows >= 128) & (self.rows < 160), self.rows - 128, -1)
            value = torch.stack([stated.masked_fill(stated // 8 != k, -1).amax(dim=1) % 8 for k in range(4)], dim=1)
            return torch.nn.functional.one_hot(164 + value.gather(1, key), VOCABULARY).float()

    told = arena.recall(Fixed(), text, 64, 20, generator)
    assert 0 < told < 0.4
    assert arena.recall(Right(), text, 64, 20, generator) == 1


def test_sinusoids_by_hand():
    """Oracle: by hand, the first Transformer's formula; coordinates 2i and 2i + 1 are sine and cosine of pos / 10000^(2i/d)."""
    config = Config(vocabulary=9, d_model=6, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=4)
    out = arena.Sinusoidal().embedding(config)(torch.tensor([[0, 7]]), torch.float32)
    assert out[0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    angles = [7 / 10000 ** (2 * i / 6) for i in range(3)]
    assert_close(out[0, 1], torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)]))


def test_figures_are_those_announced_and_repeat(short):
    """Oracle: a second run from the same seed; the curve is the losses."""
    conditions = seeded()
    first, second = arena.baseline(conditions), arena.baseline(seeded())
    assert list(first) == [metric.name for metric in arena.METRICS] and first == second
    assert conditions.curves == {"loss over length": [(64 * n, first[f"loss_{n}x"]) for n in (1, 2, 4, 8)]}


@dataclass(frozen=True)
class Drawing(Positions):
    """Draws, and does nothing else."""

    def rotary(self, config, generator=None):
        torch.rand(7, generator=generator)


def test_methods_meet_the_same_substrate(short, monkeypatch):
    """Oracle: the batches and first weights that another method met, and what that one drew does not matter."""
    met = []
    real = arena.facts

    def spy(rows, vocabulary, generator):
        met[-1].append(real(rows, vocabulary, generator))
        return met[-1][-1]

    monkeypatch.setattr(arena, "facts", spy)
    found = []
    for method in (NoPositions(), Drawing(), arena.Sinusoidal()):
        met.append([])
        found.append(arena.figures(method, seeded()))
    assert all(torch.equal(x, y) for other in met[1:] for x, y in zip(met[0], other, strict=True))
    assert found[0] == found[1] and found[0] != found[2]


@dataclass(frozen=True)
class Extending(Positions):
    """Notes what it is put onto."""

    extends = True
    tuned: int | None = None

    def rotary(self, config, generator=None):
        return Rotary(config)

    def tuning_length(self, trained):
        return self.tuned and self.tuned * trained


@pytest.mark.parametrize("tuned", [None, 2])
def test_what_extends_gets_a_trained_rotary_model(short, monkeypatch, tuned):
    """Oracle: the lengths and steps of the fits, and whether the method was there."""
    fits, method, real = [], Extending(tuned), Positions.install
    monkeypatch.setattr(arena, "_fit", lambda model, text, length, steps, generator: fits.append((length, steps)))
    monkeypatch.setattr(Positions, "install", lambda *inputs: (fits.append("installed"), real(*inputs))[1])
    model = arena.trained(method, seeded())
    assert isinstance(model.rotary, Rotary) and not model.training
    assert fits == [(64, 10), "installed", *([(128, 1)] if tuned else [])]


def test_training_learns_the_text_and_the_facts(short, monkeypatch):
    """Oracle: a text that repeats one character can be told for sure, before training it can't."""
    monkeypatch.setattr(arena, "characters", lambda split, n: torch.full((min(n, 5000),), 7))
    monkeypatch.setattr(arena, "QUICK_STEPS", 30)
    assert arena.figures(NoPositions(), seeded())["loss_1x"] < 0.1 < math.log(VOCABULARY)


def test_text_is_the_testbeds():
    """Oracle: the interpreter's sources; the splits share no start, and every character is ASCII."""
    train, held_out = arena.characters("train", 500), arena.characters("held-out", 500)
    assert len(train) == len(held_out) == 500 and train.dtype == torch.int64 and train.min() >= 0 and train.max() < 128
    assert not torch.equal(train, held_out)


def test_a_users_model_is_refused(short, tmp_path):
    with pytest.raises(ValueError, match="model"):
        arena.baseline(Conditions(generator=torch.Generator(), model=tmp_path))
