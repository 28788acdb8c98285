"""The distillation arena: its figures, its curve, and that all methods meet the same student and tokens."""

import math
from types import SimpleNamespace

import pytest
import torch

from refimpl.arena import distillation as arena
from refimpl.arena.protocol import Conditions
from refimpl.compression.distillation.protocol import WhiteBox
from refimpl.compression.distillation.white_box.hinton_kd import HintonKD
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import perplexity

CONFIG = Config(vocabulary=61, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    """A tiny teacher on random text, and few steps."""
    model = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.3).eval()
    train, unseen = torch.randint(0, 61, (2, 500), generator=torch.Generator().manual_seed(1))
    texts = {"train": train, "held-out": unseen}
    given = SimpleNamespace(model=model, text=lambda split, n: texts[split][:n])
    monkeypatch.setattr(arena.testbed, "subject", lambda path, device: given)
    for name, value in {
        "STEPS": 8,
        "BATCH": 2,
        "LENGTH": 20,
        "QUICK_STEPS": 2,
        "QUICK_BATCH": 3,
        "QUICK_LENGTH": 10,
        "UNSEEN": 480,
    }.items():
        monkeypatch.setattr(arena, name, value)
    return model


def conditions(seed=4, **given):
    return Conditions(torch.Generator().manual_seed(seed), **given)


def test_figures_are_those_announced_and_repeat():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (arena.baseline, lambda given: arena.measure(HintonKD, {"temperature": 1.0}, given)):
        first, second = run(conditions()), run(conditions())
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]


def test_figures_are_what_their_names_say(teacher):
    """Oracle: `perplexity`; a model is at distance 0 from itself and agrees everywhere; the divergence written out."""
    tokens = arena.testbed.subject(None, "cpu").text("held-out", 120)
    student = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(5), std=0.3)
    loss, divergence, agreement = arena._compare(student, teacher, tokens, 20)
    assert math.exp(loss) == pytest.approx(perplexity(student, tokens, 20), rel=1e-4)
    with torch.no_grad():
        log_q, log_p = (model(tokens.view(-1, 20)[:, :-1]).log_softmax(-1) for model in (student, teacher))
    expected = torch.nn.functional.kl_div(
        log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean"
    )
    assert divergence == pytest.approx(float(expected), rel=1e-4)
    assert agreement == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).float().mean()))
    assert student.training
    _, distance, alike = arena._compare(teacher, teacher, tokens, 20)
    assert distance == 0 and alike == 1


def test_every_method_meets_the_same_student_and_tokens():
    """Oracle: what two methods were shown."""
    seen = []

    class Watching(WhiteBox):
        def loss(self, student_logits, teacher_logits, labels, mask=None):
            seen.append((student_logits.detach().clone(), labels.clone()))
            return student_logits.square().mean()

    arena.measure(Watching, {}, conditions())
    first, seen = seen, []
    arena.measure(HintonKD, {}, conditions())  # another method between them
    arena.measure(Watching, {}, conditions())
    assert torch.equal(seen[0][0], first[0][0])
    assert len(seen) == len(first) == 8
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen, first, strict=True))
    other = []
    seen = other
    arena.measure(Watching, {}, conditions(seed=5))
    assert not torch.equal(seen[0][1], first[0][1])  # negative control


def test_the_curve_counts_tokens():
    """Oracle: by hand: 8 steps of 2 x 20 tokens, a point after each eighth; the quick form's 2 steps of 3 x 10."""
    given = conditions()
    figures = arena.baseline(given)
    [points] = given.curves.values()
    assert [tokens for tokens, _ in points] == [40 * step for step in range(1, 9)]
    assert points[-1][1] == pytest.approx(math.log(figures["perplexity"]), abs=0.3)  # on an eighth of the text
    quick = conditions(quick=True)
    arena.baseline(quick)
    assert [tokens for tokens, _ in next(iter(quick.curves.values()))] == [30, 60]


def test_the_teacher_is_left_as_it_was(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    arena.measure(HintonKD, {}, conditions())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_rate_rises_and_falls():
    """Oracle: by hand."""
    assert arena._schedule(0.0) == pytest.approx(0.1) and arena._schedule(0.1) == pytest.approx(1.0)
    assert arena._schedule(0.55) == pytest.approx(0.5) and arena._schedule(1.0) == pytest.approx(0.0)
