"""What tests of sequence mixers count: numbers that a forward writes, and what a small model recalls after short training."""

import math

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.arena.mixers import KEYS, VALUES, Recaller, texts


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.numbers += out.numel()
        return out


@torch.no_grad()
def power_of_the_length(mixer, generator, width=8):
    """Power with which the numbers grow that are written in a forward, from 512 to 4,096 positions."""
    counts = []
    for time in (512, 4096):
        with Written() as written:
            mixer(torch.randn(1, time, width, generator=generator))
        counts.append(written.numbers)
    return math.log(counts[1] / counts[0], 8)


def trained_recaller(method, steps=100, pairs=4, fillers=0, rate=5e-3):
    """A model of the arena after some steps on its task, 32 texts a step; with fillers as `recalled` has them."""
    generator = torch.Generator().manual_seed(0)
    model = Recaller(method, generator)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, 10 * step / steps + 0.1) * (1 - step / steps)
        read, answers = drawn(32, pairs, fillers, generator)
        loss = F.cross_entropy(model(read)[:, -pairs:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def recalled(model, pairs=4, fillers=0):
    """Share of values that it recalls in texts that it has not seen, with random values between the pairs and the questions."""
    read, answers = drawn(256, pairs, fillers, torch.Generator().manual_seed(1))
    return (model.eval()(read)[:, -pairs:].argmax(dim=-1) == answers).float().mean().item()


def drawn(n, pairs, fillers, generator):
    """Texts, fillers between their pairs and their questions, and the answers."""
    stated, questions, answers = texts(n, pairs, generator).split([2 * pairs, pairs, pairs], dim=1)
    between = torch.randint(KEYS, KEYS + VALUES, (n, fillers), generator=generator)
    return torch.cat((stated, between, questions), dim=1), answers
