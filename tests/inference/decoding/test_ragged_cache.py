"""The cache of rows that part: what a decoder reads from it is what it would read of each row alone."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.decoding.ragged_cache import RaggedCache
from refimpl.model.cache import FullCache
from refimpl.model.generate import pad

LENGTHS = torch.tensor([7, 3, 9])  # what each row keeps of 10 tokens


@torch.no_grad()
def alone(model, rows):
    """The last logits of each row, read whole and without a cache."""
    return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_part_are_read_as_if_alone(target, generator, padded):
    """Oracle: each row's own text, read without a cache; two more calls after rows were taken back to different lengths."""
    tokens = torch.randint(0, 61, (3, 10), generator=generator)
    padding = torch.tensor([0, 2, 4]) if padded else None
    cuts = padding.tolist() if padded else [0, 0, 0]
    cache = RaggedCache()
    target(tokens, cache, cache.shifted(padding))
    cache.truncate(LENGTHS)
    new = torch.randint(0, 61, (3, 7), generator=generator)
    target(new[:, :3], cache, cache.shifted(padding))
    cache.truncate(LENGTHS + torch.tensor([1, 3, 0]))
    logits = target(new[:, 3:], cache, cache.shifted(padding))[:, -1]
    rows = []
    for i, (cut, more) in enumerate(zip(cuts, (1, 3, 0), strict=True)):
        rows.append([*tokens[i, cut : LENGTHS[i]].tolist(), *new[i, :more].tolist(), *new[i, 3:].tolist()])
    assert_close(logits, alone(target, rows), rtol=1e-4, atol=1e-4)  # logits of size 10 through 3 layers
    assert cache.lengths.tolist() == [12, 10, 13] and cache.length == 13


@torch.no_grad()
def test_even_rows_cost_what_a_full_cache_costs(target, generator):
    """Oracle: `FullCache`: the same logits and, for who attends, no positions to build a mask from; the same bytes."""
    tokens = torch.randint(0, 61, (3, 9), generator=generator)
    ragged, full = RaggedCache(reserve=20), FullCache(reserve=20)
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        assert torch.equal(target(part, ragged, ragged.shifted(None)), target(part, full))
        assert ragged.shifted(None) is None
    assert ragged.nbytes == full.nbytes == 3 * 2 * 3 * 2 * 20 * 8 * 4  # layers, k and v, rows, heads, room, dim, bytes
    x = torch.zeros(3, 2, 1, 8)
    assert ragged.update(0, x, x, x, torch.tensor([[9]]))[2] is None


def test_what_nobody_attends_to_is_finite():
    """Oracle: 0 times NaN is NaN: entries behind a short row must not be what the memory happened to hold."""
    cache, x = RaggedCache(reserve=64), torch.ones(2, 1, 2, 2)
    cache.update(0, x, x, x, torch.arange(2)[None])
    cache.truncate(torch.tensor([0, 2]))
    k, v, positions = cache.update(0, x, x, x, torch.tensor([[0, 1], [2, 3]]))
    assert torch.isfinite(k).all() and torch.isfinite(v).all()
    assert positions.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]


def test_positions_count_from_the_end_of_the_padding():
    """Oracle: by hand."""
    padding = pad([[5, 7, 33], [8]])[1]
    cache, x = RaggedCache(), torch.ones(2, 1, 3, 2)
    assert cache.shifted(padding) is padding and len(cache.lengths) == 0 and cache.length == 0
    cache.update(0, x, x, x, torch.tensor([[0, 1, 2], [-2, -1, 0]]))
    cache.truncate(torch.tensor([1, 3]))
    assert cache.shifted(padding).tolist() == [2, 2]
    new = x[:, :, :2]
    positions = cache.update(0, new, new, new, torch.tensor([[1, 2], [1, 2]]))[2]
    assert positions.tolist() == [[0, 1, 2, -1, -1], [-2, -1, 0, 1, 2]]


def test_layers_may_be_skipped():
    """A layer that holds less than others stays as it is when all are taken back."""
    cache, x = RaggedCache(), torch.ones(1, 1, 4, 2)
    for layer in (0, 1):
        cache.update(layer, x, x, x, torch.arange(4)[None])
    cache.update(1, x, x, x, torch.arange(4, 8)[None])
    assert cache.length == 8
    cache.truncate(torch.tensor([6]))
    k, _, _ = cache.update(0, x, x, x, torch.arange(4, 8)[None])
    assert k.shape[2] == 8 and cache.lengths.tolist() == [8]


def test_reset_forgets_and_frees():
    cache, x = RaggedCache(), torch.ones(2, 1, 4, 2)
    cache.update(0, x, x, x, torch.arange(4)[None])
    cache.compress_prefill()
    assert cache.length == 4
    cache.reset()
    assert cache.length == 0 and cache.nbytes == 0
    cache.update(0, x[:1], x[:1], x[:1], torch.arange(4)[None])


@pytest.mark.parametrize("lengths", [[5, 4], [-1, 2], [3]])
def test_lengths_that_were_never_held(lengths):
    cache, x = RaggedCache(), torch.ones(2, 1, 4, 2)
    cache.update(0, x, x, x, torch.arange(4)[None])
    with pytest.raises(ValueError, match="can't be gone back to"):
        cache.truncate(torch.tensor(lengths))


def test_another_batch_is_refused():
    cache, x = RaggedCache(), torch.ones(2, 1, 4, 2)
    cache.update(0, x, x, x, torch.arange(4)[None])
    with pytest.raises(ValueError, match="batch of 2, and gets 1"):
        cache.update(0, x[:1], x[:1], x[:1], torch.arange(4)[None])
