"""Rows that share blocks: samples and beams. Oracle: full caches of the same rows."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.system_level.paged_cache import PagedCache
from refimpl.model.beam import beam_search
from refimpl.model.generate import generate, pad


def test_text_is_that_of_a_full_cache(model, generator):
    """Oracle: `generate` with its own cache: a padded batch, prompts read in chunks."""
    tokens, padding = pad([[5, 7, 33, 2, 60, 1, 1, 9, 30, 12], [8], [3, 41, 5]])
    cache = PagedCache(model.config, 100, block_size=4, like=model.norm.weight)
    found = generate(model, tokens, 9, padding=padding, cache=cache, prefill_chunk=4)
    assert torch.equal(found, generate(model, tokens, 9, padding=padding))
    assert cache.length == 18 and cache.blocks.taken == 3 * 5 and cache.nbytes == 15 * cache.pool.block_bytes
    cache.reset()
    assert cache.nbytes == cache.length == cache.blocks.taken == 0


def test_samples_share_their_prompt(plain, generator):
    """Oracle: drawn from the repeated prompt, with the same source; blocks by hand: of 22 tokens two in four blocks are the samples' own.

    The prompt's 13 first tokens are three full blocks and one of one token, which each sample copies when it writes: 3 + 5 * 3 blocks.
    """
    prompt = torch.randint(61, (1, 14), generator=generator)
    cache = PagedCache(plain.config, 100, block_size=4, like=plain.norm.weight)
    with torch.no_grad():
        plain.hidden(prompt[:, :-1], cache)
    cache.select([0] * 5)
    assert cache.blocks.taken == 4
    drawn = [
        generate(
            plain, tokens.expand(5, -1), 9, temperature=1.0, generator=torch.Generator().manual_seed(3), cache=given
        )
        for tokens, given in ((prompt[:, -1:], cache), (prompt, None))
    ]
    assert torch.equal(*drawn) and len({tuple(row) for row in drawn[0].tolist()}) > 1
    assert cache.length == 22 and cache.blocks.taken == 3 + 5 * 3
    assert sum(len(table.blocks) for table in cache.blocks.tables.values()) == 5 * 6


def test_beams_are_those_of_a_cache_that_copies(model):
    """Oracle: `beam_search` with a cache whose rows are copied; what beams share is held once, and what is given up is free."""
    prompt = torch.tensor([[5, 7, 33, 2, 60, 1, 1]])
    cache = PagedCache(model.config, 200, block_size=4, like=model.norm.weight)
    mine, theirs = beam_search(model, prompt, 12, 5, cache=cache), beam_search(model, prompt, 12, 5)
    assert torch.equal(mine.tokens, theirs.tokens) and torch.allclose(mine.scores, theirs.scores, atol=1e-5)
    owned = sum(len(table.blocks) for table in cache.blocks.tables.values())
    assert owned == 5 * 5 and cache.blocks.taken < owned - 4  # the prompt's full block at least
    cache.reset()
    assert cache.blocks.free == 50


def test_errors(plain):
    cache = PagedCache(plain.config, 8, block_size=4, like=plain.norm.weight)
    with torch.no_grad():
        plain.hidden(torch.tensor([[5, 7, 33]]), cache)
        with pytest.raises(ValueError, match="holds a batch of 1, and gets 2"):
            plain.hidden(torch.tensor([[5], [7]]), cache)
        cache.reset()
        with pytest.raises(ValueError, match="9 tokens more need 3 blocks, and 2 of 2 are free: give it more memory"):
            plain.hidden(torch.arange(9)[None], cache)
    with pytest.raises(ValueError, match="block_size=0 must be at least 1, and memory=8 hold a block"):
        PagedCache(plain.config, 8, block_size=0, like=plain.norm.weight)


@pytest.mark.parametrize("rows", [[0, 1], [0, 0]])
def test_what_blocks_ran_out_for_may_be_given_once_more(plain, rows):
    """Oracle: a cache with room from the first; of two rows the first gets the last block, and the second none: it is given back."""
    prompt, more = torch.tensor([[5, 7, 33, 2], [1, 2, 3, 4]]), torch.tensor([[9], [8]])
    small, large = (PagedCache(plain.config, blocks * 4, block_size=4, like=plain.norm.weight) for blocks in (4, 8))
    with torch.no_grad():
        for cache in (small, large):
            plain.hidden(prompt, cache)
        other = small.blocks.open()
        small.blocks.append(other, 4)
        before = small.nbytes
        with pytest.raises(ValueError, match="1 tokens more need 1 blocks, and 0 of 4 are free"):
            plain.hidden(more, small)
        assert (small.length, small.nbytes) == (4, before)
        small.blocks.close(other)
        for cache in (small, large):
            cache.select(rows)
        assert_close(plain.hidden(more, small), plain.hidden(more, large))
