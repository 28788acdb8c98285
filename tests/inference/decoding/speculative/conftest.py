"""A chain, and real text, that Medusa's heads are trained on."""

import pytest
import torch

from refimpl import testbed
from refimpl.inference.decoding.speculative import medusa_heads
from refimpl.inference.decoding.speculative.medusa import Medusa
from refimpl.model.generate import generate
from tests.inference.decoding.chances import markov
from tests.inference.decoding.unseen import unseen_text


@pytest.fixture(scope="session")
def chain():
    """A target that is a Markov chain of 6 states, its table, and heads trained on a text of it, in fewer and larger steps."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(6, 6, generator=generator) + 12 * torch.eye(6)[torch.randperm(6, generator=generator)]
    table = table / table.sum(1, keepdim=True)
    target = markov(table)
    text = generate(target, torch.zeros(16, 1, dtype=torch.int64), 250, temperature=1.0, generator=generator).flatten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medusa_heads, "RATE", 0.05)
        heads = Medusa(heads=3, nodes=20).prepare(target, None, text, generator)
    return target, table, heads


@pytest.fixture(scope="session")
def heads_of_testbed():
    """Medusa's heads for the testbed's model, as they come."""
    generator = torch.Generator().manual_seed(0)
    return Medusa().prepare(unseen_text()[0], None, testbed.corpus.tokens("train", 20_000), generator)
