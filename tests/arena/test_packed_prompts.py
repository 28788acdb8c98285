"""The arena of packed prompts: what a prompt says, what is counted, and that what is learnt can be told from chance."""

import math

import pytest
import torch

from refimpl.arena import packed_prompts as arena
from refimpl.arena.protocol import Conditions
from refimpl.data.prompting.compression.gist import Gist


def conditions(seed=0):
    return Conditions(torch.Generator().manual_seed(seed), quick=True)


def test_a_prompt_says_once_by_how_much_the_input_is_moved(generator):
    """Oracle: by hand: the one token from 4 to 7 says it; in a circle of four."""
    for prompt, (given,), (answer,) in arena.drawn(50, generator):
        (move,) = [token - 4 for token in prompt if 4 <= token < 8]
        assert len(prompt) == 26 and all(8 <= token < 12 for token in prompt if token - 4 != move)
        assert answer == (given + move) % 4


def test_only_the_answer_is_learnt():
    """Oracle: by hand: a model that gives its last token two thirds of the mass, and another its first."""

    class Says(torch.nn.Module):
        embedding = torch.nn.Embedding(3, 1)

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 3)
            logits[:, -1, 2] = math.log(4.0)
            return logits

    loss = arena.whole_loss(Says(), torch.tensor([[0, 1, 2], [1, 1, 0]]))
    assert loss.item() == pytest.approx(-(math.log(4 / 6) + math.log(1 / 6)) / 2)


@pytest.mark.parametrize("tokens", [1, 2])
def test_bytes_are_those_of_what_is_held(tokens, monkeypatch):
    """Oracle: arithmetic: two layers of keys and values, 32 numbers of four bytes each, of the gist or of the whole prompt."""
    monkeypatch.setattr(arena, "FIRST_STEPS", 1)
    monkeypatch.setattr(arena, "QUICK_STEPS", 1)
    figures = arena.measure(Gist, {"tokens": tokens}, conditions())
    assert list(figures) == [metric.name for metric in arena.METRICS]
    assert figures["prompt_bytes"] == tokens * 2 * 2 * 32 * 4
    assert figures["compression"] == 26 / tokens
    whole = arena.baseline(conditions())
    assert (whole["prompt_bytes"], whole["compression"]) == (26 * 2 * 2 * 32 * 4, 1)


def test_the_whole_prompt_is_learnt_and_a_hidden_one_is_not(monkeypatch):
    """Oracle: all right with the prompt in sight; without it one in four, by chance."""
    monkeypatch.setattr(arena, "QUICK_STEPS", 30)
    whole = arena.baseline(conditions())["accuracy"]
    hidden = arena.measure(Gist, {"condition": "negative"}, conditions())["accuracy"]
    assert whole > 0.95 and 0.1 < hidden < 0.4
