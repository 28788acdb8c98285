"""A language model that is trained in seconds, with weights and inputs that training has given a structure."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train, windows

LENGTH = 32


class Trained(NamedTuple):
    """A model, texts to calibrate on, and a text it has not seen."""

    model: Decoder
    calibration: list[Tensor]  # one batch, [32, LENGTH]
    held_out: Tensor


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Two blocks trained on a language in which two tokens determine the next one, four times in five."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 16, 16, generator=generator).argmax(-1).tolist()
    text = [0, 0]
    for drawn in torch.randint(0, 20, (10000,), generator=generator).tolist():
        text.append(drawn if drawn < 4 else table[text[-2]][text[-1]])
    tokens = torch.tensor(text)
    shape = {"vocabulary": 16, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(n_layers=2, **shape)), generator, std=0.1)
    learned, held_out = tokens[:8000], tokens[8000:]
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), windows(learned, 16, LENGTH, generator), steps=120)
    return Trained(model.eval(), [learned[: 32 * LENGTH].view(32, LENGTH)], held_out)
