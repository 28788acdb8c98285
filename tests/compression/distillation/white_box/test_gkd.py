"""GKD: the divergences against torch and their limits, whose text is learnt from, and what that is worth."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl.compression.distillation.divergence import kl
from refimpl.compression.distillation.protocol import distill
from refimpl.compression.distillation.sampling import written
from refimpl.compression.distillation.white_box.gkd import GKD, generalized_jsd
from refimpl.compression.distillation.white_box.hinton_kd import HintonKD

DOUBLE = {"dtype": torch.float64}
DIVERGENCES = ("forward", "reverse", "jsd")


def draw(generator, *shape):
    return 2 * torch.randn(*shape, generator=generator, **DOUBLE)


# The divergences


def test_worked_by_hand():
    """Oracle: by hand: p = (1/4, 3/4), q = (3/4, 1/4), beta = 1/2: m is even, and both terms are
    1/4 log(1/2) + 3/4 log(3/2); without overlap and for beta = 0.1 it is the entropy of a coin of 0.1."""
    v, z = (torch.tensor([x], **DOUBLE).log() for x in ([0.25, 0.75], [0.75, 0.25]))
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert_close(GKD().loss(z, v, torch.tensor([0])).item(), expected)
    apart = (torch.tensor(x, **DOUBLE).log() for x in ([1.0, 0.0], [0.0, 1.0]))
    assert_close(generalized_jsd(*apart, 0.1).item(), -0.1 * math.log(0.1) - 0.9 * math.log(0.9))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_divergences_are_those_of_torch(generator, beta):
    """Oracle: Eq. (1) of torch's `kl_div` over probabilities; beta weighs the teacher, in the mixture and in the sum."""
    z, v, labels = draw(generator, 6, 7), draw(generator, 6, 7), torch.zeros(6, dtype=torch.int64)
    p, q = v.softmax(-1), z.softmax(-1)
    m = beta * p + (1 - beta) * q
    pairs = {"forward": [(1, p, q)], "reverse": [(1, q, p)], "jsd": [(beta, p, m), (1 - beta, q, m)]}
    for name in DIVERGENCES:
        expected = sum(share * F.kl_div(b.log(), a, reduction="batchmean") for share, a, b in pairs[name])
        assert_close(GKD(divergence=name, beta=beta).loss(z, v, labels), expected)
    if beta != 0.5:
        turned = GKD(beta=beta).loss(v, z, labels)
        assert (turned - GKD(beta=beta).loss(z, v, labels)).abs() > 1e-3  # negative control: it has a direction
        assert_close(turned, GKD(beta=1 - beta).loss(z, v, labels))


def test_the_ends_of_beta(generator):
    """Oracle: the limits: JSD / beta tends to the forward divergence, JSD / (1 - beta) to the reverse one; at 1/2 neither."""
    p, q = draw(generator, 5, 7).log_softmax(-1), draw(generator, 5, 7).log_softmax(-1)
    small = 1e-6
    assert_close(generalized_jsd(p, q, small) / small, kl(p, q), rtol=1e-4, atol=1e-4)  # terms of order beta are left
    assert_close(generalized_jsd(p, q, 1 - small) / small, kl(q, p), rtol=1e-4, atol=1e-4)
    assert (kl(p, q) - kl(q, p)).abs().max() > 0.1
    assert (generalized_jsd(p, q, 0.5) <= math.log(2)).all()


def test_forward_on_given_text_is_hintons(generator):
    """Oracle: HintonKD without labels at temperature 1."""
    z, v, labels = draw(generator, 3, 7), draw(generator, 3, 7), torch.tensor([1, 2, 3])
    hinton = HintonKD(temperature=1.0, alpha=1.0)
    assert_close(GKD(share=0.0, divergence="forward").loss(z, v, labels), hinton.loss(z, v, labels))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(generator, divergence):
    """Oracle: finite differences; and 0 at the teacher's own logits."""
    z, v, labels = draw(generator, 3, 5), draw(generator, 3, 5), torch.tensor([0, 4, 2])
    method, mask = GKD(divergence=divergence, beta=0.3), torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda x: method.loss(x, v, labels, mask), (z.requires_grad_(),))
    x = v.clone().requires_grad_()
    assert_close(torch.autograd.grad(method.loss(x, v, labels), x)[0], torch.zeros_like(v))


def test_tokens_that_the_teacher_rules_out(generator):
    """Oracle: the limit of ever lower logits: forward and JSD stay finite, the reverse divergence does not."""
    z, v, labels = draw(generator, 2, 6), draw(generator, 2, 6), torch.zeros(2, dtype=torch.int64)
    out, low = v.clone(), v.clone()
    out[:, 1], low[:, 1] = float("-inf"), -1e4
    for name in ("forward", "jsd"):
        assert_close(*(GKD(divergence=name).loss(z, x, labels) for x in (out, low)))
    assert GKD(divergence="reverse").loss(z, out, labels) == float("inf")


def test_forward_covers_and_reverse_seeks(fit, two_bells, claim):
    """Oracle: closed form: the bell nearest by the forward divergence has the teacher's mean and variance; by the reverse
    one it is the larger of its two bells, which hardly overlap; JSD near each end does as its limit does."""
    grid, p = torch.linspace(-8, 8, 161, **DOUBLE), two_bells.exp()
    mean = (p * grid).sum()
    covering = [mean.item(), (p * (grid - mean) ** 2).sum().sqrt().item()]
    assert covering[1] > 3
    forward, reverse = (fit(GKD(divergence=name).loss)[:2] for name in ("forward", "reverse"))
    assert forward == pytest.approx(covering, abs=1e-4)
    assert reverse == pytest.approx([-3.0, 0.7], abs=1e-3)
    claim("gkd", "forward-covers", forward[1] / covering[1])
    claim("gkd", "reverse-seeks", abs(reverse[0] + 3) / 3)  # the bells stand at -3 and 3, their middle at 0
    assert fit(GKD(beta=0.02).loss)[:2] == pytest.approx(covering, rel=0.02)
    assert fit(GKD(beta=0.98).loss)[:2] == pytest.approx([-3.0, 0.7], rel=0.02)


# Whose text


def test_whose_text_a_step_learns_from(table, generator):
    """Oracle: the batch itself; the student's own writing from the same beginning; and half of 400 draws."""
    student, teacher, batch = table(5), table(5), torch.randint(0, 5, (3, 9), generator=generator)
    given = GKD(share=0.0).sequences(batch, student, teacher, generator)
    assert given.tokens is batch and given.mask is None
    own = GKD(share=1.0, prompt=0.25).sequences(batch, student, teacher, torch.Generator().manual_seed(4))
    drawn = torch.Generator().manual_seed(4)
    torch.rand((), generator=drawn)
    assert torch.equal(own.tokens[:, :2], batch[:, :2])
    assert torch.equal(own.tokens[:, 2:], written([(1.0, student)], batch[:, :2], 7, drawn))
    assert own.mask.sum() == 3 * 7
    kinds = [GKD().sequences(batch, student, teacher, generator).mask is None for _ in range(400)]
    assert sum(kinds) == pytest.approx(200, abs=40)  # four deviations


@pytest.mark.parametrize(
    "settings", [{"share": -0.1}, {"share": 1.1}, {"divergence": "kl"}, {"beta": 0.0}, {"beta": 1.0}, {"prompt": 1.0}]
)
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        GKD(**settings)


# What it is worth. A teacher that looks at two tokens, a student that can look at one only.


class Trigrams(nn.Module):
    """`[batch, time]` tokens to logits, from the last two."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens):
        before = torch.cat((torch.zeros_like(tokens[:, :1]), tokens[:, :-1]), dim=1)
        return self.logits[before, tokens]


@pytest.fixture
def lesson(table):
    """A teacher, its text, and `learn(**settings)`: a student of one look back, after 200 steps."""
    source = torch.Generator().manual_seed(1)
    teacher = Trigrams(2.5 * torch.randn(6, 6, 6, generator=source, **DOUBLE))
    text = written([(1.0, teacher)], torch.zeros(400, 1, dtype=torch.int64), 16, source)
    start = table(6, 0.0).state_dict()

    def learn(**settings):
        student = table(6)
        student.load_state_dict(start)
        drawn = torch.Generator().manual_seed(2)
        batches = (text[torch.randint(0, 400, (32,), generator=drawn)] for _ in range(200))
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.0)
        distill(student, teacher, GKD(**settings), optimizer, batches, 200, drawn, schedule=lambda x: 1 - x)
        return student

    return teacher, text, learn


def test_own_text_is_nearer_the_teacher(lesson, claim):
    """Oracle: the same student on the teacher's text, under the same divergence: what both then write, judged by the teacher."""
    teacher, _, learn = lesson

    @torch.no_grad()
    def far(student):
        text = written([(1.0, student)], torch.zeros(2000, 1, dtype=torch.int64), 16, torch.Generator().manual_seed(3))
        return float(kl(student(text).log_softmax(-1), teacher(text).log_softmax(-1)).mean())

    given, own = (far(learn(share=share, divergence="reverse")) for share in (0.0, 1.0))
    assert own > 0.05  # control: a look back less is felt
    claim("gkd", "own-text", given - own)


def test_the_reverse_divergence_is_less_diverse(lesson, claim):
    """Oracle: the entropy of what two students expect next on the same text, each of 200 steps on given text."""
    _, text, learn = lesson

    @torch.no_grad()
    def entropy(student):
        log_q = student(text).log_softmax(-1)
        return float(-(log_q.exp() * log_q).sum(-1).mean())

    forward, reverse = (entropy(learn(share=0.0, divergence=name)) for name in ("forward", "reverse"))
    claim("gkd", "less-diverse", forward - reverse)
