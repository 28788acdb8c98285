"""Lion: by hand, number by number, the authors' own loop, and what one moment saves."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train, windows
from refimpl.pretraining.optimizers.lion import Lion
from refimpl.pretraining.protocol import parameter_groups, state_bytes


def run(weights, gradients, **settings):
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lion(parameters, **settings)
    for todo in gradients:
        for p, g in zip(parameters, todo, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def test_worked_by_hand():
    """Oracle: by hand, lr 0.1, betas (0.5, 0.75), decay 0.5, weight 2.

    Gradient 4: c = 2, weight 2 * 0.95 - 0.1 = 1.8, m = 1. Gradient -0.5: c = 0.25, still positive though the gradient is
    not, weight 1.8 * 0.95 - 0.1 = 1.61, m = 0.625. Gradient -1: c = -0.1875, weight 1.61 * 0.95 + 0.1 = 1.6295.
    """
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.5}
    gradients = [[torch.tensor([g])] for g in (4.0, -0.5, -1.0)]
    for n, expected in enumerate((1.8, 1.61, 1.6295), 1):
        assert_close(run([torch.tensor([2.0])], gradients[:n], **settings)[0][0], torch.tensor([expected]))


def test_equals_the_algorithm_written_out(generator):
    """Oracle: brute force, Algorithm 2 in plain numbers, the defaults' betas and a decay."""
    lr, beta1, beta2, decay = 0.03, 0.9, 0.99, 0.2
    weight = torch.randn(11, generator=generator, dtype=torch.float64)
    gradients = [[torch.randn(11, generator=generator, dtype=torch.float64)] for _ in range(30)]
    expected = []
    for i, theta in enumerate(weight.tolist()):
        m = 0.0
        for [g] in gradients:
            c = beta1 * m + (1 - beta1) * g[i].item()
            theta -= lr * ((c > 0) - (c < 0) + decay * theta)
            m = beta2 * m + (1 - beta2) * g[i].item()
        expected.append(theta)
    [ours], _ = run([weight], gradients, lr=lr, weight_decay=decay)
    assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    [swapped], _ = run([weight], gradients, lr=lr, betas=(beta2, beta1), weight_decay=decay)
    assert (ours - swapped).abs().max() > lr  # negative control: which momentum is used and which is kept


def test_defaults_are_the_authors():
    """Oracle: google/automl, lion/lion_pytorch.py."""
    [group] = Lion([nn.Parameter(torch.ones(1))]).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)


def test_every_entry_moves_by_the_learning_rate(generator):
    """Oracle: the sign; entries that never had a gradient stay."""
    weight = torch.randn(6, 5, generator=generator)
    gradients = [[torch.randn(6, 5, generator=generator)] for _ in range(4)]
    for [g] in gradients:
        g[2] = 0
    before, after = (run([weight], gradients[:n], lr=0.125)[0][0] for n in (3, 4))
    moved = (after - before).abs()
    assert_close(moved[[0, 1, 3, 4, 5]], torch.full((5, 5), 0.125))
    assert (moved[2] == 0).all()


@pytest.mark.parametrize("factor", [2.0**-20, 1024.0])
def test_the_update_does_not_see_the_size_of_the_loss(factor, generator):
    """Oracle: a property of the sign: a loss multiplied by a power of two gives the same training."""
    weights = [torch.randn(5, 7, generator=generator)]
    gradients = [[torch.randn(5, 7, generator=generator)] for _ in range(10)]
    scaled = [[factor * g for g in todo] for todo in gradients]
    assert torch.equal(run(weights, gradients)[0][0], run(weights, scaled)[0][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (1.5, 0.9)}, r"betas\[0\]=1.5 must be in \[0.0, 1.0\); 0.9 is usual"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 must be in \[0.0, 1.0\); 0.99 is usual"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Lion([nn.Parameter(torch.ones(2))], **change)


def test_claim_half_the_state(claim, generator):
    """Bytes of state over those of PyTorch's AdamW, on weights of 48,000 numbers."""
    weights = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((200, 200), (80, 100))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    ours, theirs = Lion(weights), torch.optim.AdamW(weights)
    ours.step()
    theirs.step()
    assert state_bytes(ours) == 4 * 48_000
    claim("lion", "half-the-state", state_bytes(ours) / state_bytes(theirs))


# Rates tried; outside, both do worse.
RATES = {torch.optim.AdamW: (1e-2, 3e-2, 1e-1), Lion: (3e-3, 1e-2, 3e-2)}


@pytest.fixture(scope="module")
def best():
    """For AdamW and Lion the best rate and its loss: a small decoder, 150 steps on words each followed by one of four."""
    generator = torch.Generator().manual_seed(0)
    follow, choice = torch.randint(64, (64, 4), generator=generator), torch.randint(4, (4000,), generator=generator)
    words = [0]
    for c in choice.tolist():
        words.append(int(follow[words[-1], c]))
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 12, "d_ff": 64}

    def loss(optimizer, rate):
        seeded = torch.Generator().manual_seed(1)
        model = initialize_(Decoder(Config(vocabulary=64, **sizes)), seeded)
        made = optimizer(parameter_groups(model, weight_decay=0.0), lr=rate)
        losses = train(model, made, windows(torch.tensor(words), 8, 32, seeded), 150, schedule=lambda done: 1 - done)
        return sum(losses[-10:]) / 10

    found = {optimizer: min((loss(optimizer, rate), rate) for rate in rates) for optimizer, rates in RATES.items()}
    for optimizer, (_, rate) in found.items():
        assert RATES[optimizer][0] < rate < RATES[optimizer][-1]  # inside the grid
    return found


def test_claim_smaller_rate(claim, best):
    """AdamW's best learning rate over Lion's, on grids of factors of about 3."""
    claim("lion", "smaller-rate", best[torch.optim.AdamW][1] / best[Lion][1])


def test_claim_loss_at_equal_tokens(claim, best):
    """Lion's loss over AdamW's after the same tokens, each at its best rate."""
    claim("lion", "loss-at-equal-tokens", best[Lion][0] / best[torch.optim.AdamW][0])
