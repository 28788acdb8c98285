"""What goes and how the rest is stored: held by sorting, by hand, and by counting bytes."""

import pytest
import torch

from refimpl.compression.pruning.sparse import (
    Pattern,
    PatternWeight,
    SparseWeight,
    lowest,
    lowest_of_groups,
    pattern_of,
    sparse_form,
)

SHAPES = [(5, 12), (3, 7), (1, 33), (4, 1), (2, 2)]
PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 3), Pattern(3, 5), Pattern(1, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [None, *PATTERNS])
def test_dense_is_the_weight_where_it_is_kept(shape, dtype, pattern, generator):
    """Oracle: `where`, bit by bit; also of a weight that lies transposed in memory."""
    weight = torch.randn(shape[::-1], generator=generator).to(dtype).T
    scores = torch.rand(shape, generator=generator)
    kept = ~lowest_of_groups(scores, pattern) if pattern else scores > 0.4
    stored = sparse_form(weight, kept, pattern)
    assert torch.equal(stored.dense(), torch.where(kept, weight, 0))
    assert stored.dense().dtype == dtype and stored.dense().is_contiguous()
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in stored.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_that_are_kept_stay_in_their_places(dtype):
    """Oracle: by hand. Which weights are kept is the mask's word, not the values'."""
    weight, kept = torch.tensor([[0.0, 5.0, 0.0, 7.0]], dtype=dtype), torch.tensor([[True, False, False, True]])
    for pattern in (None, Pattern(2, 4)):
        stored = sparse_form(weight, kept, pattern)
        assert stored.dense().tolist() == [[0.0, 0.0, 0.0, 7.0]]
        assert len(stored.values) == 2


@pytest.mark.parametrize(
    ("pattern", "nbytes"),
    [
        (None, 8 * 16 * 2 / 2 + 8 * 16 / 8),  # half of the values in 16 bits, a bit a place
        (Pattern(2, 4), 8 * 16 * 36 / 64 * 2),  # 2 × 16 + 2 × 2 bits of 64
        (Pattern(4, 8), 8 * 16 * (4 * 16 + 4 * 3) / 128 * 2),
        (Pattern(1, 3), 8 * 6 * (2 + 2 / 8)),  # 16 columns are padded to six groups of three
    ],
)
def test_bytes_by_formula(pattern, nbytes, generator):
    """Oracle: arithmetic."""
    weight = torch.randn(8, 16, generator=generator).bfloat16()
    scores = weight.float().abs()
    kept = ~lowest_of_groups(scores, pattern) if pattern else ~lowest(scores, 8)
    assert sparse_form(weight, kept, pattern).nbytes == nbytes


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_lowest_is_a_stable_sort(count, generator):
    """Oracle: a stable sort; half of the scores are equal to another, so that the order of equal ones counts."""
    scores = torch.randint(0, 6, (40, 12), generator=generator).float()
    expected = torch.zeros(40, 12, dtype=torch.bool)
    expected.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :count], True)
    assert torch.equal(lowest(scores, count), expected)


@pytest.mark.parametrize("columns", [8, 30, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_groups_lose_their_lowest(columns, pattern, generator):
    """Oracle: a stable sort of each group in Python, the last one shorter, with many ties."""
    scores = torch.randint(0, 4, (20, columns), generator=generator).float()
    expected = torch.zeros(20, columns, dtype=torch.bool)
    for row, mask in zip(scores.tolist(), expected, strict=True):
        for start in range(0, columns, pattern.of):
            group = range(start, min(start + pattern.of, columns))
            for place in sorted(group, key=lambda j, row=row: row[j])[: max(0, len(group) - pattern.kept)]:
                mask[place] = True
    assert torch.equal(lowest_of_groups(scores, pattern), expected)


def test_equal_scores_by_hand():
    """Oracle: by hand. The earlier go first."""
    assert lowest(torch.ones(2, 4), 2).int().tolist() == [[1, 1, 0, 0]] * 2
    assert lowest_of_groups(torch.zeros(1, 4), Pattern(1, 4)).int().tolist() == [[1, 1, 1, 0]]
    assert lowest_of_groups(torch.full((1, 2), -float("inf")), Pattern(1, 2)).int().tolist() == [[1, 0]]


@pytest.mark.parametrize("kept", [[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[1, 1, 0, 0, 0]], [[1, 1, 0, 0, 1, 1, 1]]])
def test_a_mask_that_breaks_its_pattern_is_refused(kept):
    kept = torch.tensor(kept, dtype=torch.bool)
    with pytest.raises(ValueError, match="kept must be true 2 times in every 4 neighbours"):
        PatternWeight(torch.ones(kept.shape), kept, Pattern(2, 4))


@pytest.mark.parametrize("sparsity", ["2", "2:", ":4", "4:4", "5:4", "0:4", "2:257", "a:b", "-1:4", "2:4:8", "1.0:2"])
def test_patterns_are_checked(sparsity):
    with pytest.raises(ValueError, match=r"must be 'N:M' with 1 <= N < M <= 256"):
        pattern_of(sparsity)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_shares_are_checked(sparsity):
    with pytest.raises(ValueError, match=r"must be 0 \(no weight is removed\) to below 1"):
        pattern_of(sparsity)


def test_patterns_by_hand():
    """Oracle: by hand."""
    assert [pattern_of(text) for text in ("2:4", "1:256")] == [Pattern(2, 4), Pattern(1, 256)]
    assert pattern_of(0.5) is None
    assert torch.equal(
        PatternWeight(torch.arange(256.0)[None], torch.arange(256)[None] == 255, Pattern(1, 256)).dense().nonzero(),
        torch.tensor([[0, 255]]),
    )
    assert SparseWeight(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.bool)).dense().tolist() == [[0.0] * 4] * 2
