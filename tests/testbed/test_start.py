"""The weights that training starts from: heads that look back, and a circuit that copies."""

import dataclasses

import pytest
import torch

from refimpl.model.model import Decoder, attend, initialize_
from refimpl.testbed import train
from refimpl.testbed.start import start

SMALL = dataclasses.replace(train.CONFIG, vocabulary=256, n_layers=2, sliding_window=())


@pytest.fixture(scope="module")
def model():
    return start(SMALL, torch.Generator().manual_seed(0))


def attention_of(model, layer, tokens):
    """Attention weights `[batch, heads, time, time]` of one layer."""
    seen = {}

    def spy(q, k, v, **options):
        k_all = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k_all.mT / q.shape[-1] ** 0.5
        seen["weights"] = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        return attend(q, k, v, **options)

    attention = model.layers[layer].attention
    attention.attend = spy
    with torch.no_grad():
        model(tokens)
    attention.attend = attend
    return seen["weights"]


def test_heads_of_the_first_layer_look_one_two_and_three_back(model, generator):
    """Oracle: the diagonals of the attention weights, computed here; the last head looks nowhere in particular."""
    weights = attention_of(model, 0, torch.randint(0, 256, (2, 100), generator=generator))
    for head, distance in enumerate((1, 2, 3)):
        assert weights[:, head].diagonal(-distance, -2, -1).mean() > 0.7
    assert weights[:, 3].diagonal(-1, -2, -1).mean() < 0.1


@pytest.mark.parametrize("period", [40, 300])
def test_the_second_layer_finds_what_came_next_the_last_time(model, generator, period):
    """Oracle: the place, known by construction, in tokens that repeat; negative control: weights without the circuit."""
    tokens = torch.stack([torch.randperm(256, generator=generator) for _ in range(2 * period // 256 + 1)]).view(-1)
    tokens = tokens[:period].repeat(3)[None]
    plain = initialize_(Decoder(SMALL), torch.Generator().manual_seed(0))
    shares = []
    for candidate in (model, plain):
        weights = attention_of(candidate, 1, tokens)[0, 0]
        after = tokens[0, :-1][None, :] == tokens[0][:, None]  # [time, time - 1], position j: token j - 1 is this one
        right = torch.cat([torch.zeros(len(after), 1, dtype=torch.bool), after], dim=1).tril()
        shares.append(float((weights * right)[period:].sum(-1).mean()))
    assert shares[0] > 0.5 > 0.1 > shares[1]


def test_copies_are_likelier_from_the_start(model, generator):
    """Oracle: the uniform distribution's loss; the first time, before there is anything to copy, the loss is no better."""
    tokens = torch.randint(0, 256, (4, 60), generator=generator).repeat(1, 3)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")
    uniform = torch.log(torch.tensor(256.0))
    assert losses[:, 60:].mean() < uniform - 0.5
    assert losses[:, :59].mean() > uniform - 0.1


@pytest.mark.parametrize(
    "change", [{"qkv_bias": False}, {"n_layers": 1, "sliding_window": ()}, {"n_heads": 2}, {"head_dim": 128}]
)
def test_a_config_without_a_place_for_it_is_refused(change, generator):
    with pytest.raises(ValueError, match="the circuit needs 2 layers, 4 heads, biases"):
        start(dataclasses.replace(SMALL, **change), generator)
