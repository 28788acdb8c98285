"""The pre-training arena: every method meets the same training, whatever part of it the method replaces."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from refimpl.arena import pretraining as arena
from refimpl.arena.protocol import Conditions
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.pretraining.mixed_precision.amp_fp16 import AmpFP16
from refimpl.pretraining.optimizers.adamw import AdamW
from refimpl.pretraining.optimizers.lion import Lion
from refimpl.pretraining.protocol import parameter_groups

EXACT = [metric.name for metric in arena.METRICS if metric.exact]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny decoder on a text that counts, so that nothing takes long; the clock may end no run early."""
    config = Config(
        vocabulary=13, d_model=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=16, tied_embeddings=True
    )
    monkeypatch.setattr(arena, "CONFIG", config)
    monkeypatch.setattr(arena, "STEPS", 20)
    monkeypatch.setattr(arena, "QUICK_STEPS", 5)
    held_out = (torch.arange(4)[:, None] + torch.arange(arena.LENGTH + 1)) % 13
    monkeypatch.setattr(arena, "corpus", lambda steps: (torch.arange(999) % 13, held_out))


def conditions(seed=4, quick=False):
    torch.seed()  # PyTorch's global generator must not matter
    return Conditions(torch.Generator().manual_seed(seed), quick=quick)


def test_figures_are_those_announced_and_repeat():
    for run in (arena.baseline, lambda given: arena.measure(Lion, {"lr": 1e-3}, given)):
        first, second, other = run(conditions()), run(conditions()), run(conditions(5))
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in EXACT] == [second[name] for name in EXACT]
        assert first["loss"] != other["loss"] and first["seconds_per_step"] > 0


def test_our_adamw_is_the_baselines():
    """Oracle: torch.optim.AdamW, at the baseline's settings."""
    ours = arena.measure(AdamW, {"lr": arena.LR, "betas": (0.9, 0.95)}, conditions())
    theirs = arena.baseline(conditions())
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert arena.measure(AdamW, {"lr": 1e-5}, conditions())["loss"] > theirs["loss"] + 0.01  # negative control


def test_state_bytes_by_hand():
    """Oracle: by hand. One number for each parameter; under float16, 2 bytes for each more than AdamW's 8 and step counts."""
    n = sum(p.numel() for p in Decoder(arena.CONFIG).parameters())
    tensors = len(list(Decoder(arena.CONFIG).parameters()))
    assert arena.measure(Lion, {}, conditions(quick=True))["state_bytes"] == 4 * n
    assert arena.measure(AmpFP16, {}, conditions(quick=True))["state_bytes"] == (8 + 2) * n + 4 * tensors


def test_a_precision_trains_as_float32_does():
    """Oracle: the baseline, to what float16 rounds."""
    half, full = arena.measure(AmpFP16, {}, conditions()), arena.baseline(conditions())
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and half["loss"] != full["loss"]


def test_curves_begin_before_the_first_step_and_reach_the_end():
    """Oracle: by hand; the loss of a model that knows nothing is near log 13."""
    given = conditions()
    figures = arena.baseline(given)
    curve = given.curves["held-out loss over tokens"]
    tokens = 20 * arena.BATCH * arena.LENGTH
    assert curve[0][0] == 0 and curve[0][1] == pytest.approx(2.565, abs=0.2)
    assert dict(curve)[tokens] == figures["loss"] < curve[0][1]
    seconds = [x for x, _ in given.curves["held-out loss over seconds"]]
    assert seconds == sorted(seconds) and len(seconds) == len(curve)


def test_equal_seconds_are_the_baselines(monkeypatch):
    """Oracle: a clock that ticks a second a reading, and two for the baseline's step; twice as fast is twice the steps."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(arena, "clock", lambda device: float(next(ticks)))
    text, held_out = arena.corpus(5)
    run = arena.Run(arena.PARTS, text, held_out, 1, 5, torch.device("cpu"))
    run.go(seconds=12.0)
    assert len(run.step_seconds) == 12 and run.seen[-1][:2] == (12, 12.0)
    assert len(arena.Run(arena.PARTS, text, held_out, 1, 5, torch.device("cpu")).go(seconds=3.0).step_seconds) == 5
    assert len(arena.Run(arena.PARTS, text, held_out, 1, 5, torch.device("cpu")).go(seconds=1e9).step_seconds) == 100


def test_values_between_the_points_of_a_curve():
    """Oracle: by hand."""
    curve = [(0.0, 8.0), (1.0, 4.0), (3.0, 2.0)]
    assert [arena.at(x, curve) for x in (0, 0.5, 1, 2, 3, 7)] == [8, 6, 4, 3, 2, 2]


def test_an_initialization_joins_with_its_own_groups():
    """Oracle: by hand. Zero weights give the loss log 13; at a rate of zero a model stays as it began."""

    @dataclass(frozen=True, kw_only=True)
    class Zeros:
        std: float = 0.0
        rate: float = 0.0
        part: ClassVar = "initialization"

        def initialize(self, model, generator):
            return initialize_(model, generator, std=self.std)

        def groups(self, model, weight_decay):
            return [{**group, "lr_scale": self.rate} for group in parameter_groups(model, weight_decay)]

    still = conditions()
    assert arena.measure(Zeros, {"std": 0.02}, still)["loss"] == still.curves["held-out loss over tokens"][0][1]
    assert arena.measure(Zeros, {}, conditions())["loss"] == pytest.approx(2.5649, abs=1e-4)
    assert (
        arena.measure(Zeros, {"std": 0.02, "rate": 1.0}, conditions())["loss"] == arena.baseline(conditions())["loss"]
    )


def test_a_growth_joins_and_pays_for_the_small_model():
    """Oracle: the number of steps on each shape, a quarter of them on the small one."""
    seen = []

    class Deeper:
        part = "growth"

        def small_config(self, config):
            return replace(config, n_layers=1, sliding_window=())

        def grow(self, small, config, batches, generator):
            assert next(batches).shape == (arena.BATCH, arena.LENGTH + 1)
            large = Decoder(config)
            large.load_state_dict({**initialize_(large, generator).state_dict(), **small.state_dict()})
            return large

    class Watched(Lion):
        def step(self, closure=None):
            seen.append(sum(len(group["params"]) for group in self.param_groups))
            return super().step(closure)

    text, held_out = arena.corpus(20)
    parts = {**arena.PARTS, "growth": Deeper, "optimizer": Watched}
    run = arena.Run(parts, text, held_out, 1, 20, torch.device("cpu")).go()
    one, two = (len(list(Decoder(replace(arena.CONFIG, n_layers=n, sliding_window=())).parameters())) for n in (1, 2))
    assert seen == [one] * 5 + [two] * 15
    assert run.seen[-1][0] == 20 and arena.measure(Deeper, {}, conditions())["loss"] > 0


def test_the_decay_of_the_settings_is_that_of_the_matrices():
    """Oracle: by hand; gains get none."""
    seen = {}

    class Watched(Lion):
        def __init__(self, params, **settings):
            super().__init__(params, **settings)
            seen.update({group["role"]: group["weight_decay"] for group in self.param_groups})

    arena.measure(Watched, {"weight_decay": 0.7}, conditions(quick=True))
    assert seen == {"hidden": 0.7, "embedding": 0.7, "vector": 0.0}
    arena.measure(Watched, {}, conditions(quick=True))
    assert seen["hidden"] == arena.WEIGHT_DECAY


def test_what_cannot_join_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Adam\.part is None; it must be one of optimizer, precision"):
        arena.measure(torch.optim.Adam, {}, conditions())
    with pytest.raises(ValueError, match="trains a model of its own"):
        arena.baseline(replace(conditions(), model=tmp_path))
