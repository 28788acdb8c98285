"""A small decoder that knows a small language, for tests that need a trained model."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train, windows

VOCABULARY, LENGTH, BATCH = 32, 24, 16
CONFIG = Config(vocabulary=VOCABULARY, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=96)


class Trained(NamedTuple):
    """A trained model, and the language it was trained on: `[n]` tokens to train on, `[n]` that it has not seen."""

    model: Decoder
    text: Tensor
    unseen: Tensor


def language(n: int, generator: torch.Generator) -> Tensor:
    """Tokens each drawn given the two before it, from sharp random tables: `[n]`."""
    tables = 2.5 * torch.randn(2, VOCABULARY, VOCABULARY, generator=generator)
    chances = (tables[0][:, None] + tables[1][None]).softmax(dim=-1)  # [last, before it, next]
    rows = torch.randint(0, VOCABULARY, (64, 2), generator=generator)
    for _ in range(n // 64):
        drawn = torch.multinomial(chances[rows[:, -1], rows[:, -2]], 1, generator=generator)
        rows = torch.cat([rows, drawn], dim=1)
    return rows[:, 2:].flatten()


@pytest.fixture(scope="session")
def trained() -> Trained:
    """The model after 120 steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = language(64 * 600, generator)
    text, unseen = tokens[: 64 * 540], tokens[64 * 540 :]
    model = initialize_(Decoder(CONFIG), generator, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0, fused=True)
    batches = windows(text, BATCH, LENGTH, generator)
    train(model, optimizer, batches, 120, schedule=lambda progress: 1 - progress)
    return Trained(model.eval(), text, unseen)
