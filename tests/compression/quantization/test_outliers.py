"""Sparse outliers: held by torch's compressed sparse rows, and by counting bytes."""

import warnings

import pytest
import torch

from refimpl.compression.quantization.outliers import Outliers


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_equals_torch(share, generator):
    """Oracle: `Tensor.to_sparse_csr`: same starts, columns and values."""
    values, mask = torch.randn(5, 7, generator=generator) + 9, torch.rand(5, 7, generator=generator) < share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own format a beta
        theirs = (values * mask).to_sparse_csr()
    kept = Outliers(values, mask, torch.float32)
    assert kept.row_start.tolist() == theirs.crow_indices().tolist()
    assert kept.column.tolist() == theirs.col_indices().tolist()
    assert kept.value.tolist() == theirs.values().tolist()
    assert torch.equal(kept.put(torch.zeros(5, 7)), values * mask)


def test_entries_replace_what_is_there(generator):
    """Oracle: `torch.where`; the dense matrix is not written."""
    values, dense = torch.randn(4, 6, generator=generator).half(), torch.randn(4, 6, generator=generator).half()
    mask, before = torch.rand(4, 6, generator=generator) < 0.5, dense.clone()
    assert torch.equal(Outliers(values, mask).put(dense), torch.where(mask, values, dense))
    assert torch.equal(dense, before)


def test_bytes_by_formula():
    """Oracle: arithmetic. Three entries of 2 + 2 bytes, and four bytes for each of 5 rows and one more; wide rows: 2 + 4."""
    for columns, width in ((9, 4), (40_000, 6)):
        mask = torch.zeros(5, columns, dtype=torch.bool)
        mask[[0, 3, 3], [1, 0, columns - 1]] = True
        kept = Outliers(torch.ones(5, columns), mask)
        assert sum(buffer.nbytes for buffer in kept.buffers()) == 3 * width + 24
        assert kept.put(torch.zeros(5, columns)).nonzero().tolist() == [[0, 1], [3, 0], [3, columns - 1]]


def test_a_state_of_another_size_is_loaded(generator):
    """Oracle: the entries that were saved; how many there are depends on the data."""
    values = torch.randn(4, 6, generator=generator)
    first, second = Outliers(values, values > 0), Outliers(-values, values > 1)
    assert len(first.value) != len(second.value)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.put(torch.zeros(4, 6)), first.put(torch.zeros(4, 6)))


def test_what_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"an outlier of 100000 is beyond torch\.float16"):
        Outliers(torch.full((1, 2), 1e5), torch.tensor([[True, False]]))
