"""A decoder without some sub-layers, against one whose sub-layers add nothing, and in a cache that the whole uses."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.ragged_cache import RaggedCache
from refimpl.inference.decoding.speculative.thinned import Thinned

SKIPPED = torch.tensor([[0, 1, 0], [1, 0, 0]])


@torch.no_grad()
def silenced(target, skipped):
    """A copy whose skipped sub-layers have an output of 0."""
    model = copy.deepcopy(target)
    for block, (attention, feed_forward) in zip(model.layers, skipped.T.tolist(), strict=True):
        if attention:
            block.attention.o_proj.weight.zero_()
        if feed_forward:
            block.feed_forward.down_proj.weight.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("skipped", [SKIPPED, 1 - SKIPPED, torch.ones(2, 3), torch.zeros(2, 3)])
def test_what_is_left_out_adds_nothing(target, generator, skipped):
    """Oracle: the same decoder with output weights of 0 there, whole and token by token in a cache."""
    tokens = torch.randint(0, 61, (2, 7), generator=generator)
    thinned, expected = Thinned(target, skipped), silenced(target, skipped)(tokens)
    assert_close(thinned(tokens), expected)
    cache = RaggedCache()
    steps = [thinned(token, cache) for token in tokens.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)  # logits of size 10 through 3 layers
    if skipped is SKIPPED:
        assert not torch.allclose(expected, target(tokens), atol=0.1)  # control


@torch.no_grad()
def test_the_whole_reads_on_where_a_draft_was_cut_off(target, generator):
    """Oracle: the whole decoder over the text alone: what a draft left in the shared cache does not show."""
    tokens, guesses = (torch.randint(0, 61, (2, n), generator=generator) for n in (6, 3))
    cache = RaggedCache()
    target(tokens, cache)
    held = cache.lengths
    Thinned(target, SKIPPED)(guesses, cache, cache.shifted(None))
    assert cache.length == 9
    cache.truncate(held)
    assert_close(target(guesses, cache), target(torch.cat((tokens, guesses), dim=1))[:, 6:], rtol=1e-4, atol=1e-4)


def test_nothing_is_copied_and_cost_is_counted(target):
    """Oracle: by hand: parameters of the parts that are kept, and of the output layer, over those of all."""
    thinned = Thinned(target, SKIPPED)
    owned = {id(parameter) for parameter in target.parameters()}
    assert all(id(parameter) in owned for parameter in thinned.parameters())
    count = lambda *parts: sum(parameter.numel() for part in parts for parameter in part.parameters())  # noqa: E731
    first, second, _ = target.layers
    gone = count(first.feed_forward, first.feed_forward_norm, second.attention, second.attention_norm)
    whole = count(*target.layers) + 61 * 32
    assert thinned.cost == pytest.approx(1 - gone / whole)
    assert Thinned(target, torch.zeros(2, 3)).cost == 1


def test_another_number_of_layers_is_refused(target):
    with pytest.raises(ValueError, match=r"skipped of shape \(2, 4\) must be \[2, n_layers\], \[2, 3\]"):
        Thinned(target, torch.zeros(2, 4))
