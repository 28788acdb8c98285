"""The cache: everything ever appended comes back, whatever the chunks; windows and truncation."""

import pytest
import torch

from refimpl.model.cache import STEP, FullCache

CHUNKS = [[1] * 9, [7, 1, 1, 1], [5, 3, 2], [200, 1, 1, 90, 1], [1, 70, 1]]


def feed(cache, k, v, chunks, layers=2):
    """Append in chunks, the second layer negated; yields what comes back after each."""
    done = 0
    for size in chunks:
        part = slice(done, done + size)
        at = torch.arange(done, done + size)[None]
        yield [cache.update(i, (-1) ** i * k[:, :, part], v[:, :, part], k[:, :, part], at) for i in range(layers)]
        done += size


def draw(generator, time, batch=2):
    k = torch.randn(batch, 3, time, 4, generator=generator)
    return k, torch.randn(batch, 3, time, 6, generator=generator)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("reserve", [0, 3, 500])
def test_all_that_was_appended_comes_back(generator, chunks, reserve):
    """Oracle: the input itself, which is also unchanged; views of before stay as they were."""
    k, v = draw(generator, sum(chunks))
    cache, earlier, copy = FullCache(reserve=reserve), [], k.clone()
    for i, (first, second) in enumerate(feed(cache, k, v, chunks)):
        n = sum(chunks[: i + 1])
        assert torch.equal(first[0], k[:, :, :n])
        assert torch.equal(second[0], -k[:, :, :n])
        assert torch.equal(first[1], v[:, :, :n])
        assert first[2] is None
        assert cache.length == n
        earlier.append((first[0], n))
    assert all(torch.equal(view, k[:, :, :n]) for view, n in earlier)
    assert torch.equal(k, copy)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("window", [1, 2, 5, 300])
def test_a_window_keeps_what_its_queries_see(generator, chunks, window):
    """Oracle: by hand: the chunk, and window - 1 tokens before it."""
    k, v = draw(generator, sum(chunks))
    cache = FullCache((window, None))
    for i, (first, second) in enumerate(feed(cache, k, v, chunks)):
        n = sum(chunks[: i + 1])
        start = max(0, n - chunks[i] - window + 1)
        assert torch.equal(first[0], k[:, :, start:n])
        assert torch.equal(first[1], v[:, :, start:n])
        assert torch.equal(second[0], -k[:, :, :n])


def test_bytes_are_those_of_the_buffers(generator):
    """Oracle: by hand: tokens of room times 3 heads times 4 + 6 numbers of 4 bytes."""
    k, v = draw(generator, 200, batch=1)
    cache = FullCache()
    assert (cache.nbytes, cache.length) == (0, 0)
    list(feed(cache, k, v, [100], layers=1))
    assert cache.nbytes == 100 * 3 * 10 * 4
    one = k[:, :, :1], v[:, :, :1], k[:, :, :1], torch.tensor([[100]])
    cache.update(0, *one)
    assert cache.nbytes == (101 + STEP) * 3 * 10 * 4
    long = FullCache()
    list(feed(long, *draw(generator, 3201, batch=1), [3200, 1], layers=1))
    assert long.nbytes == (3201 + 200) * 3 * 10 * 4
    cache.reset()
    assert (cache.nbytes, cache.length) == (0, 0)
    windowed = FullCache((5,), reserve=1000)
    list(feed(windowed, k, v, [199, 1], layers=1))
    assert windowed.nbytes == (5 + STEP) * 3 * 10 * 4  # the prompt's room is given back
    reserved = FullCache(reserve=150)
    list(feed(reserved, k, v, [100, 50], layers=1))
    assert reserved.nbytes == 150 * 3 * 10 * 4


@pytest.mark.parametrize("windows", [(), (4, None)])
def test_truncated_is_as_if_never_seen(generator, windows):
    """Oracle: a cache that saw the first tokens only."""
    k, v = draw(generator, 30)
    cache, other = FullCache(windows), FullCache(windows)
    list(feed(cache, k, v, [10, 6]))
    cache.truncate(12)
    assert cache.length == 12
    list(feed(other, k, v, [12]))
    new = k[:, :, 20:23], v[:, :, 20:23], k[:, :, 20:23], torch.arange(12, 15)[None]
    for layer in range(2):
        for ours, theirs in zip(cache.update(layer, *new)[:2], other.update(layer, *new)[:2], strict=True):
            assert torch.equal(ours, theirs)


def test_what_cannot_be_gone_back_to(generator):
    k, v = draw(generator, 30)
    cache = FullCache((4, None))
    list(feed(cache, k, v, [10, 1, 1, 1]))
    for length in (5, 11, 14, -1):  # 9 to 12 are held, and 11 needs 8
        with pytest.raises(ValueError, match=f"length={length}"):
            cache.truncate(length)
    assert cache.length == 13
    cache.truncate(12)
    assert cache.length == 12


def test_another_batch_is_an_error(generator):
    k, v = draw(generator, 3)
    cache = FullCache()
    list(feed(cache, k, v, [2]))
    with pytest.raises(ValueError, match="batch of 2, and gets 1"):
        cache.update(0, k[:1], v[:1], k[:1], torch.zeros(1, 1))


def test_compress_prefill_keeps_all(generator):
    k, v = draw(generator, 4)
    cache = FullCache()
    list(feed(cache, k, v, [3]))
    cache.compress_prefill()
    (after,) = feed(cache, k[:, :, 3:], v[:, :, 3:], [1])
    assert torch.equal(after[0][0], k)
