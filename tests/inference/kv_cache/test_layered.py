"""A cache made of layers: which rows meet which layer, with what, and what comes back of parts that keep different amounts."""

import pytest
import torch

from refimpl.inference.kv_cache.layered import LayeredCache


class Keeps:
    """Remembers what it gets, and returns the last `most` tokens, with positions if asked."""

    def __init__(self, most, told=None):
        self.most, self.told, self.calls, self.k, self.v = most, told, [], None, None

    def update(self, k, v, queries, start):
        self.calls.append((k, v, queries, start))
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        kept = min(self.most, self.k.shape[2])
        positions = torch.arange(start + k.shape[2] - kept, start + k.shape[2])[None]
        told = {None: None, "shared": positions, "heads": positions[:, None].expand(len(k), 2, -1)}[self.told]
        return self.k[:, :, -kept:], self.v[:, :, -kept:], told

    def compress_prefill(self):
        self.calls.append("compress")


def built(most=99, told=None):
    layers = []

    def layer(index):
        layers.append((index, Keeps(most, told)))
        return layers[-1][1]

    return LayeredCache(layer), layers


def tokens(start, end, rows=3):
    """Keys whose numbers are row * 100 + slot."""
    x = torch.arange(rows)[:, None] * 100.0 + torch.arange(start, end)
    return x[:, None, :, None].expand(rows, 2, end - start, 4)


def update(cache, start, end, padding, layer=0):
    x = tokens(start, end)
    positions = torch.arange(start, end)[None] - torch.tensor(padding)[:, None]
    return cache.update(layer, x, x + 0.5, x.repeat(1, 2, 1, 1), positions)


def test_a_layer_never_meets_padding():
    """Oracle: by hand: rows 0 and 2 have 2 tokens of padding, row 1 has 5; chunks of 4 and 3."""
    cache, layers = built()
    update(cache, 0, 4, [2, 5, 2])
    update(cache, 4, 7, [2, 5, 2])
    cache.compress_prefill()
    (_, first), (_, second) = layers
    assert [call[0][:, 0, :, 0].tolist() for call in first.calls[:2]] == [
        [[2, 3], [202, 203]],
        [[4, 5, 6], [204, 205, 206]],
    ]
    assert [call[3] for call in first.calls[:2]] == [0, 2]
    assert [call[0][:, 0, :, 0].tolist() for call in second.calls[:1]] == [[[105, 106]]]
    assert second.calls[0][3] == 0
    assert second.calls[0][2].shape == (1, 4, 2, 4)
    assert first.calls[-1] == second.calls[-1] == "compress"
    assert cache.length == 7


def test_without_padding_nothing_is_copied():
    """Oracle: the very tensors' memory."""
    cache, layers = built()
    x = tokens(0, 4)
    cache.update(0, x, x, x, torch.arange(4)[None])
    assert len(layers) == 1
    assert all(given.data_ptr() == x.data_ptr() for given in layers[0][1].calls[0][:3])


@pytest.mark.parametrize(
    ("most", "told", "shape"),
    [(99, None, None), (3, None, (3, 5)), (3, "shared", (3, 5)), (3, "heads", (3, 2, 5)), (99, "heads", (3, 2, 6))],
)
def test_parts_are_put_together_at_the_right(most, told, shape):
    """Oracle: by hand: 6 tokens, padding 0, 2 and 5; every entry that can be seen is a token at its own position."""
    cache, _ = built(most, told)
    padding = [0, 2, 5]
    k, v, positions = update(cache, 0, 6, padding)
    assert (positions is None) == (shape is None)
    width = k.shape[2]
    if positions is None:
        positions = torch.arange(6 - width, 6)[None] - torch.tensor(padding)[:, None]
    else:
        assert positions.shape[:-1] == shape[:-1]
    positions = positions if positions.ndim == 3 else positions[:, None].expand(-1, 2, -1)
    for row, gap in enumerate(padding):
        for head in range(2):
            seen = positions[row, head] >= 0
            assert k[row, head, seen, 0].tolist() == (row * 100 + gap + positions[row, head, seen]).tolist()
            assert torch.equal(v[row, head, seen], k[row, head, seen] + 0.5)
            assert seen.sum() == min(most, 6 - gap)
            padded = set(range(-gap, 0))  # each finds itself
            assert padded <= set(positions[row, head].tolist())


class ForQueries(Keeps):
    """Returns, of each of four query heads, one entry for each new token, which it alone sees."""

    def update(self, k, v, queries, start):
        n = k.shape[2]
        own = torch.where(torch.eye(n, dtype=torch.bool), torch.arange(start, start + n), -1)
        return queries, queries + 0.5, own[None, None]


def test_parts_whose_queries_have_entries_of_their_own():
    """Oracle: by hand: 6 tokens of row r with padding 0, 2 and 6; of what a query may see only its own entry is left."""
    cache, padding = LayeredCache(lambda _: ForQueries(99)), [0, 2, 6]
    k, v, positions = update(cache, 0, 6, padding)
    assert k.shape[:2] == v.shape[:2] == (3, 4)
    assert positions.shape == (3, 1, 6, k.shape[2])
    for row, gap in enumerate(padding):
        for query in range(6):
            at = positions[row, 0, query]
            seen = (at <= query - gap) & ((at >= 0) | (at == query - gap))  # as a decoder has it
            assert at[seen].tolist() == [query - gap]
            if query >= gap:
                assert k[row, :, seen, 0].flatten().tolist() == [row * 100 + query] * 4


def test_a_row_of_padding_only():
    """Oracle: by hand; its queries stand at -5 to -3, and so do entries."""
    cache, layers = built(2)
    _, _, positions = update(cache, 0, 3, [0, 0, 5])
    assert positions[2].tolist()[-3:] == [-5, -4, -3]
    assert len(layers[1][1].calls) == 0


def test_positions_counted_from_another_origin():
    """Oracle: by hand: the shortest row has 6 tokens after the first call, which the origin counts off by 4."""
    cache = LayeredCache(lambda _: Keeps(99), lambda length: length // 4 * 4)
    update(cache, 0, 8, [0, 2, 1])
    assert cache.length == 8 - 4
    layers = cache._layers[0]
    x = tokens(8, 9)
    cache.update(0, x, x, x, torch.tensor([[4], [2], [3]]))
    assert [layer.calls[-1][3] for layer in layers] == [4, 3, 2]
    assert cache.length == 9 - 4
    assert LayeredCache(lambda _: Keeps(99), lambda length: 5).length == 0


def test_each_layer_is_made_with_its_index():
    cache, layers = built()
    update(cache, 0, 2, [0, 0, 0], layer=0)
    update(cache, 0, 2, [0, 0, 0], layer=1)
    assert [index for index, _ in layers] == [0, 1]
    assert cache.length == 2
