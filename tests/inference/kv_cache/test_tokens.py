"""A growing tensor: everything appended comes back, in bounded room."""

import pytest
import torch

from refimpl.inference.kv_cache.tokens import Tokens


@pytest.mark.parametrize("sizes", [[1] * 70, [50, 1, 1, 30], [3]])
def test_all_that_was_appended(sizes, generator):
    """Oracle: the input; room is a sixteenth at most."""
    x = torch.randn(2, 3, sum(sizes), 4, generator=generator)
    held = Tokens()
    for part in x.split(sizes, dim=2):
        held.append(part)
        assert torch.equal(held.all(), x[:, :, : held.length])
        assert held.all().nbytes <= held.nbytes <= held.all().nbytes * 17 / 16
    assert held.length == sum(sizes)


def test_a_prompt_takes_its_own_room_and_few_appends_copy():
    """Oracle: by hand: 64 tokens, then room for 65 + 4."""
    held, places = Tokens(), []
    held.append(torch.zeros(1, 1, 64, 2))
    assert held.nbytes == 64 * 8
    for _ in range(10):
        held.append(torch.ones(1, 1, 1, 2))
        places.append((held.nbytes // 8, held.all().data_ptr()))
    assert [room for room, _ in places] == [69] * 5 + [74] * 5


def test_nothing_yet():
    held = Tokens()
    assert (held.length, held.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="nothing was appended"):
        held.all()
