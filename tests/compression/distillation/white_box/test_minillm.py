"""MiniLLM: the expected gradient over all responses of a small model, against the gradient of the divergence itself."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.distillation.protocol import Sequences, label_loss
from refimpl.compression.distillation.sampling import written
from refimpl.compression.distillation.white_box.hinton_kd import HintonKD
from refimpl.compression.distillation.white_box.minillm import MiniLLM, policy_loss, rewards_to_come

TOKENS, TIME = 3, 3
RESPONSES = torch.tensor(
    [(0, *y) for y in itertools.product(range(TOKENS), repeat=TIME)]
)  # after a prompt of one token
PLAIN = {"alpha": 0.0, "length_norm": False, "clip": None}


@pytest.fixture
def models(table):
    """Student and teacher."""
    return table(TOKENS), table(TOKENS, 2.0)


def chances(model):
    """Log-chance of each token of all responses, `[responses, time]`."""
    return model(RESPONSES[:, :-1]).log_softmax(-1).gather(-1, RESPONSES[:, 1:, None]).squeeze(-1)


def gradient(value, model):
    return torch.autograd.grad(value, model.logits, retain_graph=True)[0]


def gradients(method, student, teacher):
    """The method's gradient from each response alone, `[responses, ...]`; times the length: a sum over tokens."""
    losses = [method.objective(student, teacher, Sequences(row[None])) for row in RESPONSES]
    return torch.stack([TIME * gradient(loss, student) for loss in losses])


def expected(method, student, teacher):
    """Mean of those over what responses are drawn from."""
    mixed = method.alpha * chances(teacher).exp() + (1 - method.alpha) * chances(student).exp()
    return torch.einsum("r,r...->...", mixed.detach().prod(1), gradients(method, student, teacher))


def divergence(student, teacher):
    """KL(q || p) of whole responses, by enumeration (Eq. 1)."""
    log_q = chances(student).sum(1)
    return (log_q.exp() * (log_q - chances(teacher).detach().sum(1))).sum()


# The gradient


def test_the_expected_gradient_is_that_of_the_divergence(models):
    """Oracle: Eq. (1) by enumeration of all 27 responses, and autograd; of the decomposition of Eq. (3) no part is spare."""
    student, teacher = models
    exact = gradient(divergence(student, teacher), student)
    assert_close(expected(MiniLLM(**PLAIN), student, teacher), exact)
    one_part = TIME * sum(
        row.exp().prod() * gradient(MiniLLM().loss(student(y[None, :-1]), teacher(y[None, :-1]), y[None, 1:]), student)
        for row, y in zip(chances(student).detach(), RESPONSES, strict=True)
    )
    assert (one_part - exact).abs().max() > 0.01  # negative control: the exact part alone
    normed = expected(MiniLLM(**{**PLAIN, "length_norm": True}), student, teacher)
    assert (normed - exact).abs().max() > 0.01  # another gradient, as the paper wants it


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_the_estimator_is_eq_7_term_by_term(models, alpha, length_norm):
    """Oracle: Eqs. (3) to (7) in loops: weight of each step on both parts, rewards summed or averaged one by one."""
    student, teacher = models
    log_q, log_p = chances(student), chances(teacher).detach()
    q = log_q.detach().exp()
    mixed = alpha * log_p.exp() + (1 - alpha) * q
    total = torch.zeros_like(student.logits)
    for row, y in enumerate(RESPONSES):
        for t in range(TIME):
            weight = q[row, t] / mixed[row, t]
            now, then = student(y[t]).log_softmax(-1), teacher(y[t]).log_softmax(-1).detach()
            single = -(now.exp() * (then - now)).sum()
            rewards = [log_p[row, s] - log_q[row, s].detach() for s in range(t + 1, TIME)]
            to_come = sum(rewards, torch.zeros(())) / (max(len(rewards), 1) if length_norm else 1)
            step = weight * (gradient(single, student) - to_come * gradient(log_q[row, t], student))
            total += mixed[row].prod() * step
    method = MiniLLM(alpha=alpha, length_norm=length_norm, clip=None)
    assert_close(expected(method, student, teacher), total)


def test_a_student_that_is_its_teacher_learns_nothing(models):
    """Oracle: the optimum: rewards and divergence are 0 for each response."""
    student, teacher = models
    student.load_state_dict(teacher.state_dict())
    for method in (MiniLLM(), MiniLLM(**PLAIN)):
        assert gradients(method, student, teacher).abs().max() < 1e-12


def test_clipping_by_hand():
    """Oracle: by hand: q / (0.2 p + 0.8 q) is 0.5 / 0.58 or 0.5 / 0.42 = 1.19, and 0.1 / 0.26 = 0.38 for a token that the
    teacher prefers; outside 1 -+ 0.1, a step that would go further out is cut, one that leads back is not."""
    q, p = (torch.tensor([x, x], dtype=torch.float64).log() for x in ([0.5, 0.1, 0.5, 0.5], [0.1, 0.9, 0.9, 0.5]))
    last = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)  # reward of a last token, which is what all others get
    x = torch.cat((q, torch.zeros(2, 1).double()), 1).requires_grad_()
    mask = torch.ones_like(x, dtype=torch.bool)

    def slopes(clip):
        both = []
        for t in range(4):  # a token and the last one
            pair = x[:, [t, 4]]
            teacher = torch.cat((p[:, t : t + 1], pair[:, 1:].detach() + last), 1)
            loss = policy_loss(pair, teacher, mask[:, :2], alpha=0.2, length_norm=True, clip=clip) * 4
            both.append(torch.autograd.grad(loss, x)[0][:, t])
        return torch.stack(both, 1)

    ratios = torch.tensor([0.5 / 0.42, 0.1 / 0.26, 0.5 / 0.58, 1.0], dtype=torch.float64)
    free = -last * ratios
    assert_close(slopes(None), free)
    # clip=0.1: a punished token is cut where its ratio is below 0.9, a rewarded one where it is above 1.1
    cut = free * torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]])
    assert_close(slopes(0.1), cut)


def test_rewards_of_what_comes():
    """Oracle: by hand: 1 + 2 after the first, 2 after the second; a token that was not drawn neither adds nor counts."""
    rewards, mask = torch.tensor([[5.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert rewards_to_come(rewards, mask, length_norm=False).tolist() == [[3.0, 2.0, 0.0]]
    assert rewards_to_come(rewards, mask, length_norm=True).tolist() == [[1.5, 2.0, 0.0]]
    mask[0, 1] = False
    assert rewards_to_come(rewards * mask, mask, length_norm=True).tolist() == [[2.0, 2.0, 0.0]]


def test_tokens_that_were_not_drawn_give_no_reward():
    """Oracle: the loss without them, and what the last one of these would add."""
    log_q, log_p = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask, settings = torch.tensor([[True, True, False]]), {"alpha": 0.2, "length_norm": True, "clip": 0.2}
    loss = policy_loss(log_q, log_p, mask, **settings)
    assert_close(loss, policy_loss(log_q[:, :2], log_p[:, :2], mask[:, :2], **settings))
    assert (loss - policy_loss(log_q, log_p, torch.ones_like(mask), **settings)).abs() > 0.1  # negative control


# The whole


def test_defaults_are_the_papers():
    """Oracle: Section 3.1 and the official script: alpha 0.2, clip 0.2, plain training at weight 1."""
    method = MiniLLM()
    assert (method.alpha, method.clip, method.text, method.length_norm) == (0.2, 0.2, 1.0, True)


def test_a_step_adds_plain_training_on_the_batch(models, generator):
    """Oracle: the objective of the same draws, and `label_loss` of the batch."""
    batch = torch.randint(0, TOKENS, (4, 9), generator=generator)
    seeds = [torch.Generator().manual_seed(5) for _ in range(3)]
    parts = MiniLLM().objective(*models, MiniLLM().sequences(batch, *models, seeds[0]))
    plain = label_loss(models[0](batch[:, :-1]), batch[:, 1:])
    assert_close(MiniLLM(text=0.0).step(*models, batch, seeds[1]), parts)
    assert_close(MiniLLM(text=0.5).step(*models, batch, seeds[2]), parts + 0.5 * plain)


def test_responses_are_drawn_from_both(models, generator):
    """Oracle: `written` with the shares of Eq. (4); with alpha 0 the teacher writes nothing."""
    student, teacher = models
    batch = torch.randint(0, TOKENS, (4, 9), generator=generator)
    for alpha, writers in ((0.2, [(0.2, teacher), (0.8, student)]), (0.0, [(1.0, student)])):
        given = MiniLLM(alpha=alpha).sequences(batch, student, teacher, torch.Generator().manual_seed(2))
        drawn = written(writers, batch[:, :4], 5, torch.Generator().manual_seed(2))
        assert torch.equal(given.tokens[:, 4:], drawn) and given.mask.sum() == 4 * 5


def test_the_prompt_is_not_learnt(models, generator):
    """Oracle: a token that stands in the prompt only, before its last, has no gradient."""
    student, teacher = models
    given = Sequences(torch.tensor([[2, 2, 0, 1, 0, 1]]), torch.tensor([[False, False, True, True, True]]))
    grad = gradient(MiniLLM().objective(student, teacher, given), student)
    assert (grad[2] == 0).all() and grad[0].abs().max() > 0


@pytest.mark.parametrize(
    "settings", [{"alpha": 1.0}, {"alpha": -0.1}, {"clip": 0.0}, {"clip": 1.0}, {"text": -1.0}, {"prompt": 0.0}]
)
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MiniLLM(**settings)


# Claims


def test_the_reverse_divergence_avoids_what_the_teacher_never_writes(fit, two_bells, claim):
    """Oracle: the same bell by the forward divergence of HintonKD, whose optimum has the teacher's mean and variance."""
    _, _, forward = fit(HintonKD(temperature=1.0, alpha=1.0).loss)
    _, _, reverse = fit(MiniLLM().loss)
    void = torch.linspace(-8, 8, 161).abs() < 1
    assert two_bells[void].exp().sum() < 0.01 < forward
    claim("minillm", "avoids-void", forward / reverse)


def test_the_decomposition_lowers_the_variance(models, claim):
    """Oracle: both estimators' exact mean and variance over all responses; Eq. (2) is the one without it."""
    student, teacher = models
    log_q = chances(student)
    weight, rewards = log_q.detach().exp().prod(1), (chances(teacher) - log_q).detach()
    summed = rewards.flip(1).cumsum(1).flip(1)
    plain = torch.stack([-gradient(((summed[i] - 1) * log_q[i]).sum(), student) for i in range(len(RESPONSES))])
    ours = gradients(MiniLLM(**PLAIN), student, teacher)

    def moments(values):
        mean = torch.einsum("r,r...->...", weight, values)
        return mean, torch.einsum("r,r...->...", weight, (values - mean) ** 2).sum()

    (mean, variance), (mean_plain, variance_plain) = moments(ours), moments(plain)
    assert_close(mean, mean_plain)
    claim("minillm", "less-variance", float(variance_plain / variance))


def test_length_normalization_frees_the_reward_from_the_length():
    """Oracle: by hand: a reward of -1 for each token: the sum grows with what is to come, the mean does not."""
    rewards, mask = -torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool)
    assert rewards_to_come(rewards, mask, length_norm=False)[0].tolist() == [-7, -6, -5, -4, -3, -2, -1, 0]
    assert rewards_to_come(rewards, mask, length_norm=True)[0].tolist() == [-1] * 7 + [0]
