"""AdamW: the closed form of its first step, Algorithm 2 number by number, PyTorch's, and what decoupling is for."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.pretraining.optimizers.adamw import AdamW


def drawn(n, generator, shapes=((5, 7), (33,), (1, 3)), dtype=torch.float32):
    """n gradients for each of some weights, of sizes from 1e-4 to 100."""
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    sizes = [10 ** (6 * torch.rand(shape, generator=generator, dtype=dtype) - 4) for shape in shapes]
    return weights, [[torch.randn_like(w) * s for w, s in zip(weights, sizes, strict=True)] for _ in range(n)]


def run(make, weights, gradients, schedule=lambda step: 1.0):
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = make(parameters)
    rate = optimizer.param_groups[0]["lr"]
    for step, todo in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = rate * schedule(step)
        for p, g in zip(parameters, todo, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def test_worked_by_hand():
    """Oracle: by hand, lr 0.1, betas (0.5, 0.75), eps 0, decay 0.5, weight 2, gradients 4 and -1.

    Step 1: m 2, corrected 4; v 4, corrected 16; 2 * 0.95 - 0.1 * 4 / 4 = 1.8.
    Step 2: m 0.5, corrected 0.5 / 0.75 = 2/3; v 3.25, corrected 3.25 / 0.4375 = 52/7; 1.8 * 0.95 - 0.1 * (2/3) / sqrt(52/7).
    """
    weights, gradients = [torch.tensor([2.0])], [[torch.tensor([4.0])], [torch.tensor([-1.0])]]

    def make(p):
        return AdamW(p, lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5)

    assert_close(run(make, weights, gradients[:1])[0], torch.tensor([1.8]))
    assert_close(run(make, weights, gradients)[0], torch.tensor([1.71 - 0.1 * (2 / 3) / math.sqrt(52 / 7)]))


def test_the_first_step_is_the_sign_of_the_gradient(generator):
    """Oracle: closed form, m / sqrt(v) = g / |g| after the correction of both; epsilon is added after it."""
    [weight], [[g]] = drawn(1, generator, shapes=((5, 7),), dtype=torch.float64)
    [moved] = run(lambda p: AdamW(p, lr=0.1, eps=1e-3, weight_decay=0.0), [weight], [[g]])
    assert_close(moved, weight - 0.1 * g / (g.abs() + 1e-3))
    [moved] = run(lambda p: AdamW(p, lr=0.1, eps=0.0, weight_decay=0.0), [weight], [[g]])
    assert_close(moved, weight - 0.1 * g.sign())


@pytest.mark.parametrize("settings", [{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_pytorch(settings, dtype, generator):
    """Oracle: torch.optim.AdamW (2.13) over 100 steps, defaults and other settings, three weights at once."""
    weights, gradients = drawn(100, generator, dtype=dtype)
    ours = run(lambda p: AdamW(p, **settings), weights, gradients)
    theirs = run(lambda p: torch.optim.AdamW(p, **settings), weights, gradients)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    without = run(lambda p: torch.optim.Adam(p, **settings), weights, gradients)
    assert (ours[0] - without[0]).abs().max() > 1e-4  # negative control: L2 regularization is something else


def test_beside_pytorch(peer, generator):
    """Oracle: torch.optim.AdamW (2.13) over lists of tensors; each call is one more step on the same gradients."""
    sizes = {"d_model": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "d_ff": 512}
    model = Decoder(Config(vocabulary=2048, tied_embeddings=True, **sizes))
    weights, gradients = drawn(3, generator, shapes=[p.shape for p in model.parameters()])

    def stepping(make):
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = make(parameters)
        for todo in gradients:
            for p, g in zip(parameters, todo, strict=True):
                p.grad = g
            optimizer.step()
        return lambda: (optimizer.step(), [p.detach() for p in parameters])[1]

    peer(
        "adamw",
        "torch",
        f"the step of a decoder of {sum(w.numel() for w in weights) / 1e6:.1f} million weights",
        stepping(AdamW),
        stepping(lambda p: torch.optim.AdamW(p, foreach=True)),
        within=2e-6,  # float32 rounding of weights up to 6, four times
    )


def test_goes_on_from_pytorchs_state(generator):
    """Oracle: torch.optim.AdamW without the interruption."""
    [weight], gradients = drawn(6, generator, shapes=((5, 7),))
    one, two = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([one], lr=0.01)
    ours = AdamW([two])
    for step, [g] in enumerate(gradients):
        one.grad, two.grad = g, g
        if step == 3:
            two.data.copy_(one)
            ours.load_state_dict(theirs.state_dict())
        theirs.step()
        ours.step()
    assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_equals_the_papers_algorithm_under_any_schedule(generator):
    r"""Oracle: Algorithm 2 written out, number by number, with the paper's decay $\eta_t\lambda$.

    Decay and rate are the same at every point of the schedule once the setting is $\lambda/\alpha$.
    """
    alpha, beta1, beta2, eps, decay = 0.02, 0.9, 0.99, 1e-6, 0.004
    [weight], gradients = drawn(12, generator, shapes=((7,),), dtype=torch.float64)

    def schedule(step):
        return 0.5 * (1 + math.cos(math.pi * step / 12))

    expected = []
    for i, theta in enumerate(weight.tolist()):
        m = v = 0.0
        for t, [g] in enumerate(gradients, 1):
            m = beta1 * m + (1 - beta1) * g[i].item()
            v = beta2 * v + (1 - beta2) * g[i].item() ** 2
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            theta -= schedule(t - 1) * (alpha * m_hat / (math.sqrt(v_hat) + eps) + decay * theta)
        expected.append(theta)
    settings = {"lr": alpha, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay / alpha}
    [ours] = run(lambda p: AdamW(p, **settings), [weight], gradients, schedule)
    assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_parameters_that_join_later_count_their_own_steps(generator):
    """Oracle: closed form of a first step, taken at the optimizer's third."""
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([early, late], lr=0.1, weight_decay=0.0)
    for step in range(3):
        early.grad = torch.randn(3, generator=generator)
        late.grad = torch.tensor([5.0, -0.1, 2.0]) if step == 2 else None
        optimizer.step()
    assert_close(late.detach(), torch.tensor([0.9, 1.1, 0.9]))


def test_the_update_does_not_see_the_size_of_the_loss(generator):
    """Oracle: a property of the division (epsilon 0): a loss multiplied by 1,024 gives the same training."""
    weights, gradients = drawn(10, generator)
    larger = [[1024 * g for g in todo] for todo in gradients]

    def make(p):
        return AdamW(p, eps=0.0)

    assert all(
        torch.equal(a, b) for a, b in zip(run(make, weights, gradients), run(make, weights, larger), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 must be in \[0.0, 1.0\); 0.9 is usual"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 must be in"),
        ({"eps": -1e-8}, "eps=-1e-08 must be finite and at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(2))], **change)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [nn.Parameter(torch.ones(2))], **change}])


def decay_rate(optimizer_of, size, generator, steps=500):
    """Rate per step at which 4,096 weights at 1 shrink under noise of a size, without any signal."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    for _ in range(steps):
        weight.grad = size * torch.randn(4096, generator=generator, dtype=torch.float64)
        optimizer.step()
    return -math.log(float(weight.detach().mean())) / steps


def test_claim_decays_all_alike(claim, generator):
    """Decay rate under gradients of size 1 over that under gradients of size 0.01; with an L2 penalty it is far below 1."""
    settings = {"lr": 1e-4, "weight_decay": 1.0}
    large, small = (decay_rate(lambda p: AdamW(p, **settings), size, generator) for size in (1.0, 0.01))
    assert large == pytest.approx(1e-4, rel=0.01)  # closed form, lr * decay
    claim("adamw", "decays-all-alike", large / small)
    penalty = {"lr": 1e-4, "weight_decay": 1e-3}
    large, small = (decay_rate(lambda p: torch.optim.Adam(p, **penalty), size, generator) for size in (1.0, 0.01))
    assert large / small < 0.1


RATES, DECAYS = (-9, -7, -5), range(-12, 4)  # their log2


def best_decays(optimizer_of, generator, *, normalized=True, steps=300):
    """For each rate the log2 of the decay with the least error on new data: 16 noisy regressions, a group for each pair.

    Normalized, only the direction of the weights counts, as where a normalization follows a layer.

    Args:
        optimizer_of: makes an optimizer of a list of `(weights, rate, decay)`.
    """
    x, new = (torch.randn(16, n, 32, generator=generator) for n in (64, 256))
    truth = nn.functional.normalize(torch.randn(16, 32, 1, generator=generator), dim=1)
    y = x @ truth + torch.randn(16, 64, 1, generator=generator)
    start = torch.randn(16, 32, 1, generator=generator) * normalized
    pairs = [(2.0**rate, 2.0**decay) for rate in RATES for decay in DECAYS]
    weights = start.repeat(len(pairs), 1, 1, 1).requires_grad_()
    optimizer = optimizer_of([(nn.Parameter(w), *pair) for w, pair in zip(weights.detach(), pairs, strict=True)])

    def used():
        return nn.functional.normalize(weights, dim=2) if normalized else weights

    for step in range(steps):
        rows = torch.randint(64, (16, 4), generator=generator)[..., None]
        errors = x.gather(1, rows.expand(-1, -1, 32)) @ used() - y.gather(1, rows)
        (gradients,) = torch.autograd.grad(errors.square().sum() / 8, weights)
        for group, (rate, _), g in zip(optimizer.param_groups, pairs, gradients, strict=True):
            group["params"][0].grad, group["lr"] = g, rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    error = (new @ (used().detach() - truth)).square().mean(dim=(1, 2, 3)).nan_to_num(math.inf)
    return [DECAYS[i] for i in error.view(len(RATES), len(DECAYS)).argmin(dim=1).tolist()]


def decoupled(weights):
    """AdamW with the paper's decay: see the module."""
    return AdamW([{"params": [w], "lr": rate, "weight_decay": decay / rate} for w, rate, decay in weights])


def penalized(weights):
    """Adam with an L2 penalty."""
    return torch.optim.Adam([{"params": [w], "lr": rate, "weight_decay": decay} for w, rate, decay in weights])


def slope(best):
    return (best[-1] - best[0]) / (RATES[-1] - RATES[0])


def test_claim_separable(claim, generator):
    """Slope of the best decay over the learning rate, both as logarithms, where weights are normalized; 0 is independent."""
    best = best_decays(decoupled, generator)
    assert DECAYS[0] < min(best) and max(best) < DECAYS[-1]  # inside the grid
    claim("adamw", "separable", slope(best))


def test_an_l2_penalty_and_weights_that_are_not_normalized_couple_decay_and_rate(claim):
    """Oracle: Figure 2 of the paper, whose best settings lie on the diagonal for Adam with an L2 penalty. Without normalization
    weights settle where step and decay balance, so that it is the decay over the rate that counts."""
    assert slope(best_decays(penalized, torch.Generator().manual_seed(0))) > 0.5
    plain = slope(best_decays(decoupled, torch.Generator().manual_seed(0), normalized=False))
    assert plain > 0.5
    claim("adamw", "separable-without-normalization", plain)
