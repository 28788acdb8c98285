"""A tensor that moves: what was appended and not dropped is there, in bounded room."""

import pytest
import torch

from refimpl.inference.kv_cache.retrieved.moving_window import MovingWindow


def test_what_is_left_of_the_input(generator):
    """Oracle: a slice of the input; of 40 tokens at most, room is for 42."""
    x = torch.randn(2, 3, 400, 4, generator=generator)
    held, start, end = MovingWindow(), 0, 0
    for size in [40] + [1] * 100 + [7] * 20:
        held.append(x[:, :, end : end + size])
        end += size
        assert torch.equal(held.all(), x[:, :, start:end])
        held.drop(end - start - 33)
        start = end - 33
        assert held.length == 33
        assert held.all().untyped_storage().nbytes() <= 42 * 2 * 3 * 4 * 4


def test_nothing_yet_and_too_much():
    held = MovingWindow()
    with pytest.raises(ValueError, match="nothing was appended"):
        held.all()
    held.append(torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="count=4 must be from 0 to the 3"):
        held.drop(4)
    assert held.length == 3
