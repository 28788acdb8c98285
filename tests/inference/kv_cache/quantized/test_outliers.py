"""Numbers kept apart: put back and added by hand, bytes, what 16 bits do not express."""

import pytest
import torch

from refimpl.inference.kv_cache.quantized.groups import halved
from refimpl.inference.kv_cache.quantized.outliers import Outliers, stored


def test_put_and_add_by_hand():
    """Oracle: by hand, over two appends; what stands elsewhere stays."""
    held = Outliers()
    held.append(torch.tensor([[[[5.0, -5.0]]]]), torch.tensor([[[[2, 0]]]]), length=3)
    held.append(torch.tensor([[[[7.0, 0.0]]]]), torch.tensor([[[[1, 2]]]]), length=3)
    assert held.put(torch.ones(1, 1, 2, 3)).tolist() == [[[[-5, 1, 5], [1, 7, 0]]]]
    assert held.add(torch.ones(1, 1, 2, 3)).tolist() == [[[[-4, 1, 6], [1, 8, 1]]]]


@pytest.mark.parametrize(("length", "width"), [(256, 1), (257, 2), (2**15, 2), (2**15 + 1, 4)])
def test_places_take_what_they_must(length, width):
    """Oracle: arithmetic: the last place of a vector of this length comes back from so many bytes; a number takes two."""
    held = Outliers()
    held.append(torch.full((1, 1, 3, 1), 2.0), torch.full((1, 1, 3, 1), length - 1), length)
    assert held.nbytes == 3 * (2 + width)
    assert held.put(torch.zeros(1, 1, 3, length)).nonzero()[:, 3].tolist() == [length - 1] * 3


def test_none_are_nothing():
    """Oracle: by hand."""
    held = Outliers()
    held.append(torch.ones(1, 1, 4, 0), torch.ones(1, 1, 4, 0, dtype=torch.int64), length=9)
    assert held.nbytes == 0
    assert held.put(torch.ones(2)).tolist() == held.add(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("value", [7e4, float("nan"), -float("inf")])
def test_what_16_bits_do_not_express(value):
    with pytest.raises(ValueError, match=r"do not fit torch\.float16, finite"):
        stored(torch.tensor([1.0, value]), torch.float16)
    assert [halved(x) for x in (torch.float64, torch.bfloat16)] == [torch.float16, torch.bfloat16]
