"""Medusa's heads against closed forms, and the tree of their guesses against all combinations."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.speculative import medusa_heads as module
from refimpl.inference.decoding.speculative.medusa_heads import MedusaHeads, ahead, likeliest_paths
from refimpl.model.cache import FullCache
from tests.inference.decoding.chances import markov, tiny

# Heads


def test_heads_begin_as_the_output_layer_and_follow_the_formula(target, generator):
    """Oracle: the target's logits; then the formula, head by head and token by token."""
    heads, hidden = MedusaHeads(target, 3), torch.randn(2, 5, 32, generator=generator)
    assert_close(heads(hidden), target.logits(hidden)[:, :, None].expand(-1, -1, 3, -1))
    with torch.no_grad():
        heads.inner.normal_(generator=generator)
        heads.out.normal_(generator=generator)
    tokens = torch.tensor([[5, 7]])
    assert_close(heads.as_decoder(target)(tokens, FullCache()), heads(target.embedding(tokens)))  # what a call does
    logits = heads(hidden)
    for b, t, k in itertools.product(range(2), range(5), range(3)):
        inside = heads.inner[k] @ hidden[b, t]
        assert_close(logits[b, t, k], heads.out[k] @ (inside * inside.sigmoid() + hidden[b, t]), rtol=1e-4, atol=1e-4)


def test_a_head_says_what_stands_so_many_tokens_on():
    """Oracle: by hand: of `0 1 2 3 4 5`, behind 0, head 1 is to say 2 (1 is the target's own to say) and head 2 is to say 3."""
    assert ahead(torch.arange(6)[None], 2).tolist() == [[[2, 3], [3, 4], [4, 5]]]


@pytest.mark.parametrize("target", ["full"], indirect=True)
def test_the_loss_and_the_rate_by_hand(target, generator):
    """Oracle: the paper's sum, token by token: head k's surprise at what stands k + 1 tokens on, times 0.8 to the k; a cosine by hand."""
    heads, batch = MedusaHeads(target, 3), torch.randint(0, 61, (2, 9), generator=generator)
    with torch.no_grad():
        heads.inner.normal_(generator=generator)
        said = heads(target.hidden(batch)).log_softmax(-1)
        each = [[-said[b, t, k - 1, batch[b, t + k + 1]] for b in range(2) for t in range(5)] for k in (1, 2, 3)]
        expected = sum(0.8**k * sum(some) / 10 for k, some in enumerate(each, start=1))
        assert_close(module._loss(heads, batch, target=target), expected, rtol=1e-4, atol=1e-4)
    assert [round(module._cosine(done), 6) for done in (0, 0.05, 0.1, 0.325, 0.55, 1)] == [0, 0.5, 1, 0.853553, 0.5, 0]


def test_trained_heads_know_the_powers_of_a_chain(chain):
    """Oracle: closed form: k + 1 steps of a Markov chain have the table's power as their chances; over 4,000 tokens of text.

    Control: what they began as, one step's chances, is further off.
    """
    target, table, heads = chain
    with torch.no_grad():
        said = heads(target.hidden(torch.arange(6)[:, None]))[:, 0].softmax(-1)  # [states, heads, states]
    for k in range(3):
        power = torch.linalg.matrix_power(table, k + 2)
        assert (said[:, k] - power).abs().max() < 0.1 < (table - power).abs().max()
    assert torch.equal(target.lm_head.weight, markov(table).lm_head.weight)
    assert not any(parameter.requires_grad for parameter in heads.parameters())


# The tree


def test_hits_are_counted_by_rank(generator):
    """Oracle: by counting: where in a head's order the token stands that came k + 1 tokens on; heads differ."""
    target = tiny(generator)
    heads, batch = MedusaHeads(target, 3), torch.randint(0, 4, (2, 9), generator=generator)
    with torch.no_grad():
        heads.inner.normal_(generator=generator)
        said = heads(target.hidden(batch))
    counted = torch.zeros(3, 4, dtype=torch.float64)
    for b, t, k in itertools.product(range(2), range(5), range(3)):
        counted[k, said[b, t, k].argsort(descending=True).tolist().index(int(batch[b, t + k + 2]))] += 0.1
    assert_close(heads.hits(target, batch), counted)
    assert not torch.allclose(counted[0], counted[2])


def test_the_tree_holds_the_likeliest_of_all_combinations(generator):
    """Oracle: brute force over all combinations of 3 heads' 4 guesses, sorted; each node's parent is in the tree."""
    hits = torch.rand(3, 4, generator=generator).sort(dim=1, descending=True).values / 2
    everything = [path for depth in (1, 2, 3) for path in itertools.product(range(4), repeat=depth)]
    everything.sort(key=lambda path: -math.prod(float(hits[i, j]) for i, j in enumerate(path)))
    for nodes in (1, 7, 30):
        found = likeliest_paths(hits, nodes)
        assert set(found) == set(everything[:nodes]) and len(found) == nodes
        assert all(path[:-1] in found for path in found if len(path) > 1)
    assert len(likeliest_paths(hits, 1000)) == 4 + 16 + 64
