r"""The plain training loop of a decoder, for arenas that train their own models.

Source: none, the textbook's loop. Differs from a trainer's: no accumulation, no checkpoint; a method that is one of these
brings it.

Not here: mixed precision (`refimpl/pretraining/mixed_precision`), which steps in as `precision`; adapters.

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder, initialize_
    >>> generator = torch.Generator().manual_seed(0)
    >>> config = Config(vocabulary=11, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    >>> model = initialize_(Decoder(config), generator)
    >>> text = torch.arange(300) % 11
    >>> losses = train(model, torch.optim.AdamW(model.parameters(), 1e-2), windows(text, 4, 20, generator), steps=40)
    >>> len(losses), losses[0] > 2, losses[-1] < 1
    (40, True, True)
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]  # `loss(model, batch)`, a scalar


class Precision(Protocol):
    """In which numbers gradients are computed and steps are taken."""

    def backward(self, model: nn.Module, loss: Loss, batch: Tensor) -> Tensor:
        """Add the gradient of `loss(model, batch)` to the parameters' `grad`, and return the loss."""
        ...

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer's step; False where the gradient was not fit for one and nothing moved."""
        ...


class FullPrecision:
    """The numbers that the parameters are held in."""

    def backward(self, model: nn.Module, loss: Loss, batch: Tensor) -> Tensor:
        """Add the gradient of `loss(model, batch)` to the parameters' `grad`, and return the loss."""
        value = loss(model, batch)
        torch.autograd.backward(value)
        return value.detach()

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer's step."""
        optimizer.step()
        return True


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    steps: int,
    *,
    loss: Loss | None = None,
    clip: float | None = 1.0,
    schedule: Callable[[float], float] = lambda _: 1.0,
    precision: Precision | None = None,
    after: Callable[[int], bool | None] = lambda _: None,
) -> list[float]:
    """Train in place, and return the loss of each step.

    Args:
        model: in training mode from here on.
        optimizer: over the model's parameters; its learning rates are multiplied by `schedule` and put back at the end.
            One that looks at the model itself has a method `probe`, which is called before each step with a function that
            adds the gradient of any `loss(model, batch)` on this step's batch.
        batches: `[batch, time + 1]` tokens, at least `steps` of them.
        steps: number of updates, 1 or more.
        loss: `loss(model, batch)`, a scalar; None stands for `next_token_loss`.
        clip: largest norm of the gradient; None leaves it.
        schedule: factor of the learning rate as a function of progress, 0 to 1.
        precision: how gradients are computed and steps taken; None stands for `FullPrecision`.
        after: called after each step with the number of steps done; what is true ends the training.

    Raises:
        ValueError: no steps, or batches that end before.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    loss, precision = loss or next_token_loss, precision or FullPrecision()
    probe: Callable[[Callable[[Loss], Tensor]], None] | None = getattr(optimizer, "probe", None)
    model.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[Tensor] = []
    try:
        for batch in islice(batches, steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(len(losses) / steps)
            optimizer.zero_grad()
            if probe is not None:
                probe(partial(precision.backward, model, batch=batch))
                optimizer.zero_grad()
            losses.append(precision.backward(model, loss, batch))
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            precision.update(optimizer)
            if after(len(losses)):
                break
        else:
            if len(losses) < steps:
                raise ValueError(f"batches end after {len(losses)} of {steps} steps")
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return torch.stack(losses).tolist()


def windows(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows of a text at random places, for ever: `[batch, length + 1]`, the last token being target only.

    Raises:
        ValueError: the text is shorter than a window.
    """
    places = len(tokens) - length
    if places < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has no window of length={length} and a target")
    while True:
        start = torch.randint(places, (batch, 1), generator=generator)
        yield tokens[(start + torch.arange(length + 1)).to(tokens.device)]


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it; batch `[batch, time + 1]`."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, length: int, batch: int = 8) -> float:
    """Perplexity of a text, cut into windows of `length` that are read on their own, each but its first token predicted.

    Raises:
        ValueError: the text is shorter than a window.
    """
    n = len(tokens) // length
    if n < 1 or length < 2:
        raise ValueError(f"a text of {len(tokens)} tokens has no window of length={length} with a token to predict")
    training = model.training
    model.eval()
    total = 0.0
    for rows in torch.split(tokens[: n * length].view(n, length), batch):
        total += float(next_token_loss(model, rows)) * len(rows)
    model.train(training)
    return float(torch.tensor(total / n).exp())
