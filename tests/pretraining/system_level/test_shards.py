"""Units: where their parameters lie, and what of them each rank owns."""

from functools import partial

import pytest
import torch
from torch import nn

from refimpl.pretraining.system_level.shards import Unit, by_bytes
from refimpl.processes import launch


def layout(group):
    """Parameters of 3, 1 and 6 numbers on 4 ranks: 10 numbers, padded to 12, 3 for each rank."""
    parameters = [nn.Parameter(torch.arange(float(n)).view(shape)) for n, shape in ((3, (3,)), (1, ()), (6, (2, 3)))]
    for parameter in parameters:
        parameter.data += 10
    unit = Unit(parameters, partial(torch.optim.SGD, lr=1.0), group, resident=False)
    hidden = [bool(p.isnan().all()) for p in parameters]
    shapes = [tuple(p.shape) for p in parameters]
    parameters[2].grad = torch.full((2, 3), float(group.rank))
    parameters[0].grad = torch.ones(3)
    unit.reduce()()
    before = unit.shard.tolist()
    unit.update({parameters[2]})  # the first one's gradient must not count
    pieces = [(i, piece.numel()) for p, piece, _ in unit.pieces for i, q in enumerate(parameters) if p is q]
    return before, unit.shard.tolist(), pieces, hidden, shapes, unit.gathered().tolist()


def test_shards_by_hand():
    """Oracle: by hand. Ranks sum 0 + 1 + 2 + 3 = 6 for each number of the third parameter, and SGD at 1.0 subtracts it."""
    found = launch(layout, 4)
    assert [row[0] for row in found] == [[10, 11, 12], [10, 10, 11], [12, 13, 14], [15, 0, 0]]
    assert [row[1] for row in found] == [[10, 11, 12], [10, 4, 5], [6, 7, 8], [9, 0, 0]]
    assert [row[2] for row in found] == [[(0, 3)], [(1, 1), (2, 2)], [(2, 3)], [(2, 1)]]
    assert all(row[3] == [True] * 3 and row[4] == [(3,), (), (2, 3)] for row in found)
    assert all(row[5] == [10, 11, 12, 10, 4, 5, 6, 7, 8, 9, 0, 0] for row in found)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1]), (12, [2, 1, 1]), (100, [3, 1])])
def test_buckets_by_hand(limit, sizes):
    """Oracle: by hand, 4, 8 and 12 bytes of float32, then 4 of bfloat16, which stand apart."""
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 2, 3)] + [
        nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ]
    assert [len(bucket) for bucket in by_bytes(parameters, limit)] == sizes
