"""HintonKD: the loss against closed forms and torch's own, and what a student learns by it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl.compression.distillation.protocol import distill, label_loss
from refimpl.compression.distillation.white_box.hinton_kd import HintonKD, soft_divergence

DOUBLE = {"dtype": torch.float64}


def draw(generator, *shape):
    return 2 * torch.randn(*shape, generator=generator, **DOUBLE)


# The loss


def test_worked_by_hand():
    """Oracle: by hand. T = 2 turns logits 0 and 2 log 3 into chances 1/4 and 3/4, and equal ones into halves:
    KL = 1/4 log(1/2) + 3/4 log(3/2), times T^2 = 4; at T = 1 the label's chance is 1/2."""
    z, v = torch.zeros(1, 2, **DOUBLE), torch.tensor([[0.0, 2 * math.log(3)]], **DOUBLE)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    loss = HintonKD(temperature=2.0, alpha=0.25).loss(z, v, torch.tensor([1]))
    assert_close(loss, torch.tensor(0.25 * 4 * divergence + 0.75 * math.log(2), **DOUBLE))


def test_defaults_are_the_papers():
    """Oracle: Section 4.1: temperature 2, and labels that weigh 0.5 against 1."""
    method = HintonKD()
    assert method.temperature == 2 and math.isclose((1 - method.alpha) / method.alpha, 0.5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 5.0])
def test_both_terms_are_those_of_torch(generator, temperature):
    """Peer: torch's `kl_div` and `cross_entropy`, and the two gradients."""
    z, v, labels = (
        draw(generator, 3, 5, 11),
        draw(generator, 3, 5, 11),
        torch.randint(0, 11, (3, 5), generator=generator),
    )
    losses = []
    for theirs in (False, True):
        x = z.clone().requires_grad_()
        if theirs:
            loss = torchs(x, v, labels, temperature, 0.7)
        else:
            loss = HintonKD(temperature=temperature, alpha=0.7).loss(x, v, labels)
        losses.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert_close(*losses)


def torchs(z, v, labels, temperature, alpha):
    log_q, p = (z / temperature).log_softmax(-1).flatten(0, 1), (v / temperature).softmax(-1).flatten(0, 1)
    soft = nn.KLDivLoss(reduction="batchmean")(log_q, p) * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(z.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("what", ["loss", "loss and gradient"])
def test_beside_torch(what, peer, generator):
    """Peer: torch's `kl_div` and `cross_entropy`, over as many logits as a batch of a small model has."""
    z, v = (2 * torch.randn(2, 128, 8192, generator=generator) for _ in range(2))
    labels, method = torch.randint(0, 8192, (2, 128), generator=generator), HintonKD()

    def call(loss):
        if what == "loss":
            return loss(z)
        x = z.detach().requires_grad_()
        value = loss(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    peer(
        "hinton-kd",
        "torch",
        f"{what} of 256 tokens, 8,192 logits each",
        lambda: call(lambda x: method.loss(x, v, labels)),
        lambda: call(lambda x: torchs(x, v, labels, method.temperature, method.alpha)),
        within=1e-5,  # float32 rounding of a loss of 10
    )


def test_a_high_temperature_matches_logits(generator):
    """Oracle: Eq. (4): for centred logits T^2 dKL/dz tends to (z - v) / N; and Eq. (2) at any temperature."""
    z, v = (x - x.mean(-1, keepdim=True) for x in (draw(generator, 4, 9), draw(generator, 4, 9)))
    labels = torch.zeros(4, dtype=torch.int64)

    def gradient(temperature):
        x = z.clone().requires_grad_()
        return torch.autograd.grad(HintonKD(temperature=temperature, alpha=1.0).loss(x, v, labels) * 4, x)[0]  # a sum

    limit = (z - v) / 9
    assert_close(gradient(1e6), limit, rtol=1e-4, atol=1e-5)  # terms of order 1/T are left, times logits of 5
    assert (gradient(1.0) - limit).abs().max() > 0.05  # negative control
    q, p = (z / 3).softmax(-1), (v / 3).softmax(-1)
    assert_close(gradient(3.0), 9 * (q - p) / 3)


def test_the_balance_of_the_terms_hardly_depends_on_the_temperature(generator):
    """Oracle: Section 2: T^2 keeps the soft gradient's size: between T = 10 and 20 it changes by 10 %, without it fourfold."""
    z, v, labels = draw(generator, 50, 9), draw(generator, 50, 9), torch.zeros(50, dtype=torch.int64)

    def size(temperature):
        x = z.clone().requires_grad_()
        return torch.autograd.grad(HintonKD(temperature=temperature, alpha=1.0).loss(x, v, labels), x)[0].norm()

    assert float(size(20.0) / size(10.0)) == pytest.approx(1.0, abs=0.1)


def test_the_ends_of_alpha(generator):
    """Oracle: the labels alone; the teacher alone, to whom labels are nothing, and whose own logits cost nothing."""
    z, v, labels = draw(generator, 4, 9), draw(generator, 4, 9), torch.randint(0, 9, (4,), generator=generator)
    assert_close(HintonKD(alpha=0.0).loss(z, v, labels), label_loss(z, labels))
    soft = HintonKD(alpha=1.0)
    assert_close(soft.loss(z, v, labels), soft.loss(z, v, (labels + 1) % 9))
    x = v.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft.loss(x, v, labels), x)
    assert_close(gradient, torch.zeros_like(v))
    assert_close(soft.loss(v + 3, v - 2, labels), torch.zeros((), **DOUBLE))  # shifts say nothing


def test_gradients(generator):
    """Oracle: finite differences."""
    z, v, labels = draw(generator, 3, 5), draw(generator, 3, 5), torch.tensor([0, 4, 2])
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda x: HintonKD().loss(x, v, labels, mask), (z.requires_grad_(),))


def test_tokens_that_the_teacher_rules_out(generator):
    """Oracle: the limit of ever lower logits: chance 0 costs nothing, and gradients stay finite."""
    z, v = draw(generator, 2, 6).requires_grad_(), draw(generator, 2, 6)
    out, low = v.clone(), v.clone()
    out[:, 1], low[:, 1] = float("-inf"), -1e4
    divergences = [soft_divergence(z, x, 2.0).sum() for x in (out, low)]
    assert_close(*divergences)
    assert_close(*(torch.autograd.grad(d, z)[0] for d in divergences))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": math.inf}, {"alpha": -0.1}, {"alpha": 1.1}])
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        HintonKD(**settings)


# What a student learns. A source whose next token depends on the two before it, and a teacher that knows it well.

TOKENS = 12


class Reader(nn.Module):
    """`[batch, time]` tokens to logits, from the last two tokens through a hidden layer."""

    def __init__(self, width):
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(TOKENS, 16), nn.Linear(32, width), nn.Linear(width, TOKENS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return self.out(self.hidden(torch.cat((before, x), dim=-1)).tanh())


def write(table, rows, time, generator):
    """Text of the source, `[rows, time]`."""
    tokens = torch.randint(0, TOKENS, (rows, 2), generator=generator)
    while tokens.shape[1] < time:
        chances = table[tokens[:, -2], tokens[:, -1]]
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)), dim=1)
    return tokens


@torch.no_grad()
def nats(model, text):
    return float(label_loss(model(text[:, :-1])[:, 1:], text[:, 2:]))


@torch.no_grad()
def right(model, text):
    """Share of tokens that come out as the likeliest."""
    return float((model(text[:, :-1])[:, 1:].argmax(-1) == text[:, 2:]).float().mean())


class Lesson:
    """A source, its text, and a teacher of 48 hidden units that has read all of it."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        table = (1.5 * torch.randn(TOKENS, TOKENS, TOKENS, generator=generator)).softmax(-1)
        self.seed, self.teacher = seed, None
        self.text, self.unseen = write(table, 2000, 22, generator), write(table, 500, 22, generator)
        self.teacher = self.train(HintonKD(alpha=0.0), 48, self.text, 400)

    def train(self, method, width, text, steps, after=None):
        """A fresh model on batches of the text; `after` gets it every 20 steps."""
        torch.manual_seed(self.seed + 100 * (self.teacher is not None))
        model, drawn = Reader(width), torch.Generator().manual_seed(self.seed)
        batches = (text[torch.randint(0, len(text), (32,), generator=drawn)] for _ in range(steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def watch(done):
            if after is not None and done % 20 == 0:
                after(model)

        teacher = self.teacher or model  # the labels alone need none
        distill(model, teacher, method, optimizer, batches, steps, drawn, schedule=lambda x: 1 - x, after=watch)
        return model


@pytest.fixture(scope="module")
def lesson():
    with torch.random.fork_rng():
        yield Lesson(0)


def test_a_student_learns_more_with_a_teacher(lesson, claim):
    """Oracle: the same small student on the same tokens in the same order, by the labels alone; it meets all that the teacher
    read, as in Section 3. Three times: another source, teacher and student each."""
    saved = []
    for each in (lesson, Lesson(1), Lesson(2)):
        alone, distilled = (
            nats(each.train(HintonKD(alpha=alpha), 8, each.text, 200), each.unseen) for alpha in (0.0, 2 / 3)
        )
        assert nats(each.teacher, each.unseen) < min(alone, distilled)
        saved.append(alone - distilled)
    claim("hinton-kd", "better-than-labels", min(saved))


def test_soft_targets_carry_what_three_percent_of_the_text_lacks(lesson, claim):
    """Oracle: Table 5, in its measure and under its conditions: models of one shape, the share of right predictions; the
    labels are stopped where they are best, soft targets alone run on to the end."""
    part, seen = lesson.text[:60], []  # 3 % of 2,000 rows
    lesson.train(HintonKD(alpha=0.0), 48, part, 400, after=lambda model: seen.append(right(model, lesson.unseen)))
    soft = right(lesson.train(HintonKD(alpha=1.0), 48, part, 400), lesson.unseen)
    best, most = max(seen), right(lesson.teacher, lesson.unseen)
    assert best < most - 0.03  # control: the labels of so little text are not enough
    claim("hinton-kd", "three-percent", (soft - best) / (most - best))
