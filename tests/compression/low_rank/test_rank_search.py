"""The search for ranks: sensitivities by the long way, and the search by trying every list."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.low_rank.asvd import scaled_basis
from refimpl.compression.low_rank.factored import project
from refimpl.compression.low_rank.layers import linear_layers, replace_weight
from refimpl.compression.low_rank.rank_search import Candidate, choose_ranks, perplexities
from refimpl.compression.text_loss import loss_of
from refimpl.model.linear import weight_of
from tests.compression.conftest import decoder, llama


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 3, -1])
def test_sensitivity_is_the_perplexity_with_one_layer_cut(build, place, tokens, monkeypatch):
    """Oracle: the long way, one rank after the other with the factors in place; in pieces of one text, and at once."""
    model = build().double()
    name, layer = list(linear_layers(model).items())[place]
    basis = scaled_basis(weight_of(layer), torch.rand(weight_of(layer).shape[1], dtype=torch.float64))
    batches, expected = [tokens, tokens[:2, :5]], []
    for rank in (1, 4, 9):
        replace_weight(model, name, project(weight_of(layer), basis, rank))
        losses = [loss_of(model, batch) for batch in batches]
        expected.append(float((sum(part.sum() for part in losses) / sum(part.numel() for part in losses)).exp()))
        model.set_submodule(name, layer)
    assert_close(perplexities(model, name, basis, [1, 4, 9], batches), expected)
    monkeypatch.setattr("refimpl.compression.low_rank.rank_search.TOKENS", 1)
    assert_close(perplexities(model, name, basis, [1, 4, 9], batches), expected)
    assert model.get_submodule(name) is layer
    assert len({round(value, 6) for value in expected}) == 3


def test_masks_go_with_repeated_texts(tokens):
    """Oracle: the texts without padding."""
    model, mask = llama().double(), torch.ones_like(tokens)
    mask[0, 6:] = 0
    name, layer = next(iter(linear_layers(model).items()))
    basis = scaled_basis(weight_of(layer), torch.ones(32, dtype=torch.float64))
    found = perplexities(model, name, basis, [2, 5], [{"input_ids": tokens, "attention_mask": mask}])
    assert_close(found, perplexities(model, name, basis, [2, 5], [tokens[:1, :6], tokens[1:]]))


def case(generator):
    """Candidates of three layers with drawn perplexities."""
    layers = {"a": nn.Linear(20, 30), "b": nn.Linear(30, 20), "c": nn.Linear(40, 40)}
    draws = torch.rand(9, generator=generator).tolist()
    ranks = {"a": (2, 5, 9), "b": (2, 5, 9), "c": (4, 9, 16)}
    found = [Candidate(name, rank, draws.pop()) for name in layers for rank in ranks[name]]
    return layers, found


def removed(ranks, layers):
    total = sum(layer.weight.numel() for layer in layers.values())
    return sum(layers[n].weight.numel() - r * sum(layers[n].weight.shape) for n, r in ranks.items()) / total


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_search_ends_at_the_first_list_that_is_small_enough(ratio, generator):
    """Oracle: every list, tried in order: layers get the smallest rank of the least harmful candidates."""
    for _ in range(10):
        layers, found = case(generator)
        listed = sorted(found, key=lambda c: c.perplexity)
        for n in range(len(listed) + 1):
            expected = {}
            for name, rank, _ in listed[:n]:
                expected[name] = min(rank, expected.get(name, rank))
            if removed(expected, layers) >= ratio:
                break
        assert choose_ranks(found, layers, ratio) == expected


def test_worked_by_hand():
    """Oracle: by hand. The layer that bears truncation goes to rank 2 before the other one is touched."""
    layers = {"soft": nn.Linear(20, 20), "hard": nn.Linear(20, 20)}
    found = [
        Candidate("soft", 2, 10.1),
        Candidate("soft", 8, 10.0),
        Candidate("hard", 8, 12.0),
        Candidate("hard", 2, 90.0),
    ]
    assert choose_ranks(found, layers, 0.05) == {"soft": 8}  # 400 − 8 · 40 = 80 of 800
    assert choose_ranks(found, layers, 0.4) == {"soft": 2}  # 320 of 800
    assert choose_ranks(found, layers, 0.41) == {"soft": 2, "hard": 8}
    assert choose_ranks(found, layers, 0.0) == {}


@torch.no_grad()
def test_a_layer_that_does_nothing_is_not_sensitive(tokens):
    """Oracle: closed form. Where what follows a layer is zero, truncating it changes nothing; other layers are not so."""
    model = decoder().double()
    nn.init.zeros_(model.layers[1].feed_forward.down_proj.weight)
    whole = float(loss_of(model, tokens).mean().exp())
    for name, same in (("layers.1.feed_forward.up_proj", True), ("layers.2.feed_forward.up_proj", False)):
        basis = scaled_basis(weight_of(model.get_submodule(name)), torch.ones(32, dtype=torch.float64))
        found = perplexities(model, name, basis, [1, 12], [tokens])
        assert (found == pytest.approx([whole, whole])) == same
