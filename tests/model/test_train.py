"""The plain training loop: a step by hand, the loss by hand, and what it promises about rates, clipping and early ends."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import FullPrecision, next_token_loss, perplexity, train, windows


class Bigram(nn.Module):
    """Scores of the next token by this one alone, `[batch, time]` to `[batch, time, 5]`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens):
        return self.table[tokens]


def drawn(n, seed=1):
    return list(torch.randint(0, 5, (n, 3, 7), generator=torch.Generator().manual_seed(seed)))


def scalar(model, batch):
    """A loss with gradient 3 on a single weight."""
    return 3 * model.weight.sum() + 0 * batch.sum()


def single(value=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_loss_by_hand():
    """Oracle: by hand. Two tokens of five, equal scores: log 5 each; then a table that is sure of the right one."""
    model = Bigram()
    with torch.no_grad():
        model.table.zero_()
    assert next_token_loss(model, torch.tensor([[0, 1, 2]])).item() == pytest.approx(math.log(5))
    with torch.no_grad():
        model.table[0, 1] = model.table[1, 2] = math.log(4)  # odds of 4 to 4 others
    assert next_token_loss(model, torch.tensor([[0, 1, 2]])).item() == pytest.approx(math.log(2))


def test_a_loop_written_out_gives_the_same():
    """Oracle: the textbook's loop, written out: losses and weights, bit for bit."""
    ours, theirs, batches = Bigram(), Bigram(), drawn(4)
    losses = train(ours, torch.optim.SGD(ours.parameters(), lr=0.5), iter(batches), 4, clip=None)
    for batch, loss in zip(batches, losses, strict=True):
        value = F.cross_entropy(theirs(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        assert value.item() == loss
        theirs.zero_grad()
        value.backward()
        with torch.no_grad():
            theirs.table -= 0.5 * theirs.table.grad
    assert torch.equal(ours.table, theirs.table)
    assert ours.training


@pytest.mark.parametrize(("clip", "moved"), [(None, 3.0), (1.0, 1.0), (9.0, 3.0)])
def test_gradients_are_clipped_by_norm(clip, moved):
    """Oracle: by hand, a gradient of 3 at a rate of 1."""
    model = single()
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), [torch.ones(1, 2)], 1, loss=scalar, clip=clip)
    assert model.weight.item() == pytest.approx(1 - moved, abs=1e-5)  # PyTorch divides by norm + 1e-6


def test_the_schedule_multiplies_each_groups_rate_and_is_put_back():
    """Oracle: by hand. Progress 0, 1/4, 1/2, 3/4 of rates 1 and 2, gradient 3."""
    model, other, seen = single(0.0), single(0.0), []
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 1.0}, {"params": other.parameters(), "lr": 2.0}])

    def both(_, batch):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return scalar(model, batch) + scalar(other, batch)

    train(model, optimizer, [torch.ones(1, 2)] * 4, 4, loss=both, clip=None, schedule=lambda progress: progress)
    assert seen == [[0.0, 0.0], [0.25, 0.5], [0.5, 1.0], [0.75, 1.5]]
    assert model.weight.item() == -3 * 1.5
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_rates_are_put_back_when_a_loss_raises():
    model = single()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer, [torch.ones(1, 2)], 1, loss=lambda *_: 1 // 0, schedule=lambda _: 0.1)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_after_is_called_with_the_steps_done_and_can_end():
    seen = []

    def after(done):
        seen.append(done)
        return done == 3

    model = Bigram()
    assert len(train(model, torch.optim.SGD(model.parameters(), lr=0.1), drawn(9), 9, after=after)) == 3
    assert seen == [1, 2, 3]


def test_batches_that_end_and_no_steps_are_refused():
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="batches end after 2 of 5 steps"):
        train(model, optimizer, drawn(2), 5)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        train(model, optimizer, drawn(2), 0)


def test_no_more_batches_are_taken_than_steps():
    batches = iter(drawn(5))
    model = Bigram()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 3)
    assert len(list(batches)) == 2


def test_an_optimizer_may_look_at_the_model_and_leaves_no_gradient():
    """Oracle: the same training without the look; the look sees the gradient of its own loss, by hand."""
    seen = []

    class Looking(torch.optim.SGD):
        def probe(self, backward):
            value = backward(lambda model, batch: 5 * model.weight.sum() + 0 * batch.sum())
            seen.append((value.item(), self.param_groups[0]["params"][0].grad.item()))

    one, two = single(), single()
    train(one, Looking(one.parameters(), lr=1.0), [torch.ones(1, 2)] * 2, 2, loss=scalar, clip=None)
    train(two, torch.optim.SGD(two.parameters(), lr=1.0), [torch.ones(1, 2)] * 2, 2, loss=scalar, clip=None)
    assert seen == [(5.0, 5.0), (-10.0, 5.0)]
    assert torch.equal(one.weight, two.weight)


def test_a_precision_stands_around_backward_and_update():
    """Oracle: by hand; a precision that refuses every second step."""

    class Every2(FullPrecision):
        def __init__(self):
            self.calls = 0

        def update(self, optimizer):
            self.calls += 1
            return self.calls % 2 == 1 and super().update(optimizer)

    model = single(0.0)
    train(
        model, torch.optim.SGD(model.parameters(), lr=1.0), [torch.ones(1, 2)] * 4, 4, loss=scalar, clip=None, precision=Every2()
    )  # fmt: skip
    assert model.weight.item() == -6.0


def test_windows_are_pieces_of_the_text_and_repeat_from_a_seed():
    """Oracle: in a text that counts, every window does; all places are drawn, the last one too."""
    text = torch.arange(12)
    first, again = (next(windows(text, 200, 7, torch.Generator().manual_seed(3))) for _ in range(2))
    assert first.shape == (200, 8) and torch.equal(first, again)
    assert (first.diff(dim=1) == 1).all()
    assert first[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="a text of 7 tokens has no window of length=7"):
        next(windows(text[:7], 1, 7, torch.Generator()))


def test_perplexity_by_hand():
    """Oracle: by hand. Equal scores over 5 tokens: perplexity 5; what is left over at the end is not read."""
    model = Bigram()
    with torch.no_grad():
        model.table.zero_()
    assert perplexity(model, torch.arange(23) % 5, length=7) == pytest.approx(5)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_perplexity_is_the_mean_over_windows_whatever_the_batch(batch):
    """Oracle: each window's loss alone; the model's mode is as before."""
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 8}
    model = initialize_(Decoder(Config(vocabulary=5, **sizes)), torch.Generator().manual_seed(0), std=0.5).train()
    text = torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(1))
    losses = [next_token_loss(model, text[i : i + 7][None]).detach() for i in (0, 7, 14)]
    assert_close(perplexity(model, text, 7, batch), float(torch.stack(losses).mean().exp()), rtol=1e-5, atol=0)
    assert model.training


@pytest.mark.parametrize("length", [1, 24])
def test_perplexity_needs_a_token_to_predict(length):
    with pytest.raises(ValueError, match=f"no window of length={length} with a token to predict"):
        perplexity(Bigram(), torch.zeros(23, dtype=torch.int64), length)
