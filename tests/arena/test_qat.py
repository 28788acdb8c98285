"""The arena of quantization-aware training, on a small random model in place of the testbed's."""

import copy
import math
from typing import NamedTuple

import pytest
import torch

from refimpl.arena import qat as arena
from refimpl.arena.protocol import Conditions
from refimpl.compression.protocol import compress
from refimpl.compression.quantization.qat.bitnet_b158 import BitNet
from refimpl.compression.quantization.qat.llm_qat import LLMQAT
from refimpl.compression.quantization.qat.ste_qat import STEQAT
from refimpl.compression.quantization.weight_only.awq import AWQ
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import perplexity

CONFIG = Config(vocabulary=61, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
WEIGHTS = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24)


class Subject(NamedTuple):
    """A model whose vocabulary is too small for words: its score is how likely it finds the text, and how many are asked."""

    model: Decoder

    def text(self, split, n):
        return (torch.arange({"train": 900, "held-out": 300}[split]) % 7)[:n]

    def score(self, task, samples):
        return len(samples) / perplexity(self.model, self.text("held-out", 300), 10)


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """A tiny model on text that repeats itself, and few steps."""
    made = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.2).eval()
    monkeypatch.setattr(arena.testbed, "subject", lambda path, device: Subject(made))
    settings = {
        "STEPS": 12,
        "BATCH": 3,
        "LENGTH": 10,
        "RATE": 1e-2,
        "RATE_OF_FEW_BITS": 2e-2,
        "TASKS": ("few_shot", "retrieval"),
        "EXAMPLES": 2,
    }
    for name, value in settings.items():
        monkeypatch.setattr(arena, name, value)
    return made


def conditions(seed=4, **given):
    return Conditions(torch.Generator().manual_seed(seed), **given)


def weights_alone(bits):
    return {"bits": bits, "group_size": 8, "activation_bits": None}


@pytest.mark.parametrize("quick", [False, True])
def test_figures_are_those_announced_and_repeat(quick):
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (
        arena.baseline,
        lambda given: arena.measure(STEQAT, {"bits": 2}, given),
        lambda given: arena.measure(LLMQAT, {}, given),
        lambda given: arena.measure(RTN, {"bits": 2}, given),
        lambda given: arena.measure(AWQ, {"bits": 2, "group_size": 8}, given),
    ):
        first, second = (run(conditions(quick=quick)) for _ in range(2))
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]


def test_bits_by_hand():
    """Oracle: arithmetic: 2 bits, and for 8 weights a scale of 16 bits and a zero point of 2."""
    for method, settings in ((STEQAT, weights_alone(2)), (RTN, {"bits": 2, "group_size": 8})):
        figures = arena.measure(method, settings, conditions())
        assert figures["bits"] == 2 + 18 / 8 and figures["layer_bytes"] == WEIGHTS * figures["bits"] / 8
    assert arena.baseline(conditions())["bits"] == 16


def test_what_is_trained_starts_where_rounding_ends():
    """Oracle: RTN on the same grids: `before` of one is the perplexity of the other; training lowers it, at a price in time."""
    trained = arena.measure(STEQAT, weights_alone(2), conditions())
    rounded = arena.measure(RTN, {"bits": 2, "group_size": 8}, conditions())
    assert trained["before"] == pytest.approx(rounded["perplexity"], rel=1e-5) == rounded["before"]
    assert trained["perplexity"] < 0.8 * trained["before"]
    assert rounded["seconds_per_step"] == 0 < trained["seconds_per_step"]


def test_the_baseline_is_trained_as_long(model):
    """Oracle: `perplexity` of the model; training on the same batches lowers it."""
    given = conditions()
    figures = arena.baseline(given)
    assert figures["before"] == pytest.approx(perplexity(model, torch.arange(300) % 7, 10))
    assert figures["perplexity"] < 0.8 * figures["before"]
    assert (
        figures["added"] == pytest.approx(math.log(figures["perplexity"] / figures["before"])) and figures["added"] < 0
    )
    assert [step for step, _ in given.curves["loss over steps"]] == list(range(1, 13))


def test_loss_and_score_beside_the_model_as_it_was(model):
    """Oracle: `perplexity` of the model, of it rounded, and of what is scored: as many examples of each task as are wanted."""
    expected = [perplexity(m, torch.arange(300) % 7, 10) for m in (model, compress(model, RTN(bits=2, group_size=8)))]
    figures = arena.measure(RTN, {"bits": 2, "group_size": 8}, conditions())
    assert figures["added"] == pytest.approx(math.log(expected[1] / expected[0])) and abs(figures["added"]) > 0.01
    assert figures["score"] == pytest.approx(2 / expected[1])
    assert arena.measure(RTN, {"bits": 2, "group_size": 8}, conditions(quick=True))["score"] == pytest.approx(
        1 / expected[1]
    )
    assert arena.measure(STEQAT, weights_alone(2), conditions())["peak_bytes"] >= 0


def test_the_rate_rises_and_falls(monkeypatch):
    """Oracle: `schedule` at each step's progress, times the rate, as the optimizer holds it; with few bits that is another."""
    held = []

    class Watching(torch.optim.AdamW):
        def step(self, *arguments):
            held.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setattr(arena.torch.optim, "AdamW", Watching)
    arena.baseline(conditions())
    assert held == pytest.approx([arena.RATE * arena.schedule(step / 12) for step in range(12)])
    assert held[0] < held[1] < held[2] > held[3] > held[-1] > 0
    expected = list(held)
    for method, settings, times in ((STEQAT, {"bits": 3}, 1), (STEQAT, {"bits": 2}, 2), (BitNet, {}, 2)):
        held.clear()
        arena.measure(method, settings, conditions())
        assert held == pytest.approx([times * rate for rate in expected])


def test_all_learn_from_the_same_batches_and_leave_the_model_as_it_was(model):
    """Oracle: what two methods were shown; the model's state."""
    before, seen = copy.deepcopy(model.state_dict()), []

    class Watching(STEQAT):
        def loss(self, student, teacher, batch):
            seen[-1].append(batch.clone())
            return super().loss(student, teacher, batch)

    for settings, seed in (({"bits": 2}, 4), ({"bits": 3}, 4), ({"bits": 2}, 5)):
        seen.append([])
        arena.measure(Watching, settings, conditions(seed))
    assert len(seen[0]) == 12 and seen[0][0].shape == (3, 11)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][0], seen[2][0])  # negative control
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_methods_that_round_with_data_get_as_much_text():
    """Oracle: counting what the method was shown."""
    rows = []

    class Watching(GPTQ):
        def __call__(self, weight, inputs=None):
            rows.append(len(inputs))
            return super().__call__(weight, inputs)

    arena.measure(Watching, {"bits": 4, "group_size": 8}, conditions())
    assert set(rows) == {12 * 3 * 10}
