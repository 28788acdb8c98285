"""What a model writes: the likeliest token read off it, and its own distribution."""

import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.qat.own_text import GREEDY, evaluating, vocabulary, written
from tests.compression.conftest import VOCABULARY, decoder, llama, opt


@pytest.mark.parametrize("build", [decoder, llama, opt])
def test_sequences_begin_greedily_and_go_on_at_random(build, logits):
    """Oracle: the likeliest token read off the model, step by step; other seeds change the rest, and nothing before it."""
    model = build()
    first = torch.arange(6)
    for greedy in GREEDY:
        rows = written(model, first, greedy, 12, torch.Generator().manual_seed(0))
        assert rows.shape == (6, 12) and torch.equal(rows[:, 0], first)
        for i in range(1, greedy):
            assert torch.equal(rows[:, i], logits(model, rows[:, :i])[:, -1].argmax(-1))
        other = written(model, first, greedy, 12, torch.Generator().manual_seed(1))
        assert torch.equal(other[:, :greedy], rows[:, :greedy]) and not torch.equal(other, rows)


def test_what_is_drawn_follows_the_models_distribution():
    """Oracle: the model's own probabilities of the fourth token after the three that are not drawn."""
    model, n = decoder(), 4000
    rows = written(model, torch.full((n,), 7), 3, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        chances = (model(rows[:1, :3])[0, -1]).softmax(-1)
    share = torch.bincount(rows[:, 3], minlength=VOCABULARY) / n
    assert_close(share, chances, rtol=0, atol=4 * math.sqrt(0.25 / n))  # four standard errors
    assert chances.max() < 0.999


def test_a_model_gets_its_mode_back():
    """Oracle: the mode before, also after an error."""
    model = decoder().train()
    assert evaluating(model, lambda: torch.tensor(float(model.training))).item() == 0 and model.training
    with pytest.raises(ZeroDivisionError):
        evaluating(model, lambda: 1 / 0)
    assert model.training and vocabulary(model) == VOCABULARY
