"""What holds for every selection method; the list of methods is the taxonomy's, and the baseline."""

import pytest
import torch

import taxonomy
from refimpl.data.selection.protocol import RandomSelection

METHODS = taxonomy.load().find(category="data/selection", implemented=True)
TEXTS = ["", "red apple pie", "x = y + 1", "green apple", "return x", "", "apple", "for x in y: pass"]
TARGET = ["a red apple", "an apple pie"]


@pytest.fixture(params=["random", *(method.id for method in METHODS)])
def method(request):
    """A method at its default settings, and the baseline."""
    return RandomSelection() if request.param == "random" else taxonomy.load().methods[request.param].load()()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("k", range(1, len(TEXTS) + 1))
def test_exactly_k_ascending_none_twice(method, k):
    """Oracle: counting; k = all is every index."""
    chosen = method(TEXTS, k, TARGET, seeded())
    assert chosen.dtype == torch.int64 and chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == k and chosen.min() >= 0 and chosen.max() < len(TEXTS)


@pytest.mark.parametrize("k", [0, -1, len(TEXTS) + 1])
def test_other_numbers_are_refused(method, k):
    with pytest.raises(ValueError, match=f"k={k} must be 1 to 8"):
        method(TEXTS, k, TARGET, seeded())


def test_the_generator_decides(method):
    """Oracle: itself from the same state."""
    assert torch.equal(method(TEXTS, 4, TARGET, seeded()), method(TEXTS, 4, TARGET, seeded()))


def test_empty_texts_and_inputs_stay(method):
    """Oracle: what was passed; a corpus of nothing but empty texts."""
    texts, target = list(TEXTS), list(TARGET)
    method(texts, 3, target, seeded())
    assert texts == TEXTS and target == TARGET
    assert len(method(["", "", ""], 2, TARGET, seeded())) == 2


def test_random_selection_takes_all_equally_often():
    """Oracle: 2 of 5 each, over 2,000 draws, four standard errors of 0.011."""
    draws = torch.cat([RandomSelection()(["a"] * 5, 2, [], seeded(seed)) for seed in range(2000)])
    assert (torch.bincount(draws) / 2000 - 0.4).abs().max() < 0.044
