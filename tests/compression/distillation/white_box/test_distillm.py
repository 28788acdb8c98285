"""DistiLLM: the skew divergences against their formulas, and which text a step learns from."""

import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.distillation.divergence import kl
from refimpl.compression.distillation.protocol import Sequences, distill, label_loss
from refimpl.compression.distillation.white_box import distillm
from refimpl.compression.distillation.white_box.distillm import DistiLLM, Replay, skew_kl, unseen_loss

DOUBLE = {"dtype": torch.float64}


def draw(generator, *shape):
    return 2 * torch.randn(*shape, generator=generator, **DOUBLE)


# The divergences


def test_worked_by_hand():
    """Oracle: by hand: p = (1/4, 3/4), q = (3/4, 1/4), alpha = 1/2: the mixture is even both ways, and
    alpha = 1/4 mixes (5/8, 3/8) for skl and (3/8, 5/8) for srkl."""
    v, z = (torch.tensor([x], **DOUBLE).log() for x in ([0.25, 0.75], [0.75, 0.25]))
    label = torch.tensor([0])
    for name, alpha, a, b in (
        ("skl", 0.5, (0.25, 0.75), (0.5, 0.5)),
        ("skl", 0.25, (0.25, 0.75), (0.625, 0.375)),
        ("srkl", 0.25, (0.75, 0.25), (0.375, 0.625)),
    ):
        expected = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        assert_close(DistiLLM(divergence=name, alpha=alpha).loss(z, v, label).item(), expected)


@pytest.mark.parametrize("divergence", ["skl", "srkl"])
def test_gradients(generator, divergence):
    """Oracle: finite differences; the form of the authors' code, over probabilities; 0 at the teacher's own logits."""
    z, v, labels = draw(generator, 3, 5), draw(generator, 3, 5), torch.tensor([0, 4, 2])
    method = DistiLLM(divergence=divergence)
    assert torch.autograd.gradcheck(lambda x: method.loss(x, v, labels), (z.clone().requires_grad_(),))
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    p, q = v.softmax(-1), y.softmax(-1)
    if divergence == "skl":
        theirs = -(p * (0.1 * p + 0.9 * q).log()).sum(-1).mean()
    else:
        theirs = -(q * (0.9 * p + 0.1 * q).log() - q * q.log()).sum(-1).mean()
    ours = method.loss(x, v, labels)
    assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, y)[0])
    same = v.clone().requires_grad_()
    assert_close(torch.autograd.grad(method.loss(same, v, labels), same)[0], torch.zeros_like(v))


def test_no_skew_is_the_plain_divergence(generator):
    """Oracle: `kl`, either way; with a skew it is less, and at most log 1 / alpha, whatever the two are."""
    z, v, labels = draw(generator, 4, 7), draw(generator, 4, 7), torch.zeros(4, dtype=torch.int64)
    p, q = v.log_softmax(-1), z.log_softmax(-1)
    assert_close(DistiLLM(alpha=0.0).loss(z, v, labels), kl(p, q).mean())
    assert_close(DistiLLM(alpha=0.0, divergence="srkl").loss(z, v, labels), kl(q, p).mean())
    assert (skew_kl(p, q, 0.1) < kl(p, q)).all()
    apart = (torch.tensor(x, **DOUBLE).log() for x in ([1.0, 0.0], [0.0, 1.0]))
    assert_close(skew_kl(*apart, 0.1).item(), math.log(10))


def test_the_gradient_is_bounded(claim):
    """Oracle: closed form: the derivative by q_i is -(1 - alpha) p_i / (alpha p_i + (1 - alpha) q_i); without the skew it is
    -p_i / q_i, without bound."""
    p = torch.tensor([0.7, 0.3], **DOUBLE)
    largest, plain = [], []
    for exponent in range(1, 61):
        q = torch.tensor([math.exp(-exponent), 1 - math.exp(-exponent)], **DOUBLE).requires_grad_()
        (slope,) = torch.autograd.grad(skew_kl(p.log(), q.log(), 0.1), q)
        assert_close(slope, -0.9 * p / (0.1 * p + 0.9 * q.detach()))
        largest.append(float(slope.abs().max()))
        plain.append(float(torch.autograd.grad(skew_kl(p.log(), q.log(), 0.0), q)[0].abs().max()))
    assert max(plain) > 1e20
    claim("distillm", "bounded-gradient", max(largest))


# The schedule


def looks(losses, **settings):
    """Shares after each look at a loss."""
    run, shares = Replay(DistiLLM(**settings), 100, None), []
    for loss in losses:
        run.look(loss)
        run.done += 1
        shares.append(round(run.share, 6))
    return shares


def test_the_share_rises_with_the_loss():
    """Oracle: by hand, as the authors' code does: 0.1 at each rise of 0.1 over the loss at the start or the last rise; a
    loss that falls changes nothing, and the share ends at 1."""
    assert looks([2.0, 1.0, 2.05, 2.1, 2.15, 2.25]) == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2]
    assert looks([2.0, 2.3, 2.6], share=0.5, tolerance=0.5) == [0.5, 0.5, 0.6]
    assert looks(range(5), share=0.75) == [0.75, 0.85, 0.95, 1.0, 1.0]


def test_it_looks_twenty_times_at_what_is_held_back(table, generator, monkeypatch):
    """Oracle: by hand: 50 steps, a look at 0, 3, 5, 8 and so on; at the text given, or else at the first batch."""
    student, teacher, seen = table(5), table(5), []
    monkeypatch.setattr(distillm, "unseen_loss", lambda student, tokens: seen.append(tokens) or 1.0)
    batches = [torch.randint(0, 5, (2, 6), generator=generator) for _ in range(50)]
    optimizer = torch.optim.AdamW(student.parameters())
    for unseen in (batches[-1], None):
        seen.clear()
        distill(student, teacher, DistiLLM(), optimizer, iter(batches), 50, generator, unseen=unseen)
        assert len(seen) == 20 and all(x is (batches[0] if unseen is None else unseen) for x in seen)


def test_the_loss_on_unseen_text(table, generator):
    """Oracle: `label_loss`, of a student in evaluation mode, which is then as before."""
    tokens = torch.randint(0, 5, (3, 7), generator=generator)
    student = torch.nn.Sequential(table(5), torch.nn.Dropout(0.5)).train()
    loss = unseen_loss(student, tokens)
    assert loss == pytest.approx(label_loss(student[0](tokens[:, :-1]), tokens[:, 1:]).item())
    assert student.training


# The buffer


def kinds(run, student, batch, steps, generator):
    """What each step learnt from: `given`, `fresh` or `old`; of fresh text the buffer's end tells."""
    out = []
    for _ in range(steps):
        run.done += 1
        last = run.buffer[-1] if run.buffer else None
        given = run.sequences(batch, student, generator)
        if given.mask is None:
            assert given.tokens is batch
            out.append("given")
            continue
        assert torch.equal(given.mask, (torch.arange(1, 8) >= 4).expand(3, -1))
        out.append("old" if last is not None and run.buffer[-1] is last else "fresh")
        assert out[-1] == "old" or torch.equal(given.tokens[:, :4], batch[:, :4])
    return out


def test_which_text_a_step_learns_from(table, generator):
    """Oracle: the chances of Section 3.2, over 900 steps: 0.6 own; of these fresh until 30 are kept, and then 1 - t/T."""
    student, batch = table(5), torch.randint(0, 5, (3, 8), generator=generator)
    run = Replay(DistiLLM(share=0.6, capacity=30), 900, None)
    seen = kinds(run, student, batch, 900, generator)
    own = [kind for kind in seen if kind != "given"]
    assert len(own) == pytest.approx(540, abs=60)  # four deviations
    assert own[:10] == ["fresh"] * 10 and len(run.buffer) == 30
    early, late = seen[:300], seen[-300:]
    assert early.count("fresh") == pytest.approx(0.6 * 300 * 5 / 6, abs=35)
    assert late.count("old") == pytest.approx(0.6 * 300 * 5 / 6, abs=35)
    run = Replay(DistiLLM(share=1.0, capacity=6), 1, None)  # at its end, when 1 - t/T is 0: first the buffer is filled
    assert kinds(run, student, batch, 4, generator) == ["fresh", "fresh", "old", "old"]
    with pytest.raises(ValueError, match="capacity=2 must hold a batch, 3 sequences"):
        Replay(DistiLLM(share=1.0, capacity=2), 1, None).sequences(batch, student, generator)


def test_old_text_is_drawn_without_repetition(table, generator):
    """Oracle: rows marked one by one: a batch of three has three of them, each with its mask; all come up in time."""
    run = Replay(DistiLLM(share=1.0, capacity=5), 10, None)
    run.buffer.extend(torch.full((8,), row) for row in range(5))
    run.done, seen = 10, set()
    for _ in range(40):
        given = run.sequences(torch.zeros(3, 8, dtype=torch.int64), table(5), generator)
        rows = given.tokens[:, 0].tolist()
        assert len(set(rows)) == 3 and given.mask.sum() == 3 * 4
        seen.update(rows)
    assert seen == set(range(5))


def test_without_own_text_it_is_the_divergence_on_the_batch(table, generator):
    """Oracle: the loss of the batch; of `step` alone, and of a training with share 0."""
    student, teacher, batch = table(5), table(5), torch.randint(0, 5, (3, 8), generator=generator)
    method = DistiLLM()
    expected = method.objective(student, teacher, Sequences(batch))
    assert_close(method.step(student, teacher, batch, generator), expected)
    assert_close(method.begin(student, teacher, 9, generator).step(student, teacher, batch, generator), expected)


def test_each_training_starts_anew(table, generator):
    """Oracle: the share and buffer of one training, and those of the next."""
    method = DistiLLM(share=1.0)
    first, second = (method.begin(table(5), table(5), 9, generator) for _ in range(2))
    first.step(table(5), table(5), torch.zeros(3, 8, dtype=torch.int64), generator)
    assert len(first.buffer) == 3 and first.done == 1
    assert len(second.buffer) == second.done == 0


def test_the_buffer_spares_writing(table, claim, generator):
    """Oracle: counted over a training of 400 steps on own text, with a buffer of ten batches."""
    run = Replay(DistiLLM(share=1.0, capacity=30), 400, None)
    seen = kinds(run, table(5), torch.randint(0, 5, (3, 8), generator=generator), 400, generator)
    assert "given" not in seen
    claim("distillm", "fewer-generations", seen.count("fresh") / 400)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "kl"},
        {"alpha": 1.0},
        {"share": 1.1},
        {"tolerance": -0.1},
        {"capacity": 0},
        {"prompt": 0.0},
    ],
)
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        DistiLLM(**settings)
