"""Divergences of histograms: by the slides' pseudocode in numpy, by the slides' own example, and by hand."""

import numpy as np
import pytest
import torch

from refimpl.compression.quantization.divergence import divergence, kl_bins, magnitudes


def divergences(counts, levels):
    """The slides' loop over thresholds, bin by bin; a level's bins are those whose left end lies in it."""
    found = {}
    for i in range(levels, len(counts) + 1):
        p = np.array(counts[:i], dtype=float)
        p[-1] += sum(counts[i:])
        q = np.zeros(i)
        for level in range(levels):
            bins = [j for j in range(i) if level * i <= j * levels < (level + 1) * i]
            full = [j for j in bins if counts[j]]
            for j in full:
                q[j] = sum(counts[k] for k in bins) / len(full)
        p, q = p / p.sum(), q / max(q.sum(), 1)
        terms = [a * np.log(a / b) if b else np.inf for a, b in zip(p, q, strict=True) if a]
        found[i] = sum(terms)
    return found


@pytest.mark.parametrize(("bins", "levels"), [(24, 4), (24, 8), (25, 2), (33, 7)])
def test_divergence_by_the_pseudocode(bins, levels, generator):
    """Oracle: the definition, bin by bin, in numpy: every candidate, and the widest of the best. Empty bins are among them."""
    falling = torch.arange(bins, 0, -1) ** 2
    counts = (torch.rand(5, bins, generator=generator) * falling / 20).floor()
    counts[1, 5:20], counts[2, -1], counts[3, :3] = 0, 0, 0
    tried = torch.arange(levels, bins + 1)
    ours, chosen = divergence(counts, levels, tried), kl_bins(counts, levels)
    for row, found, best in zip(counts.tolist(), ours.tolist(), chosen.tolist(), strict=True):
        expected = divergences(row, levels)
        assert found == pytest.approx(list(expected.values()), abs=1e-12)
        least = min(expected.values())
        assert best == max(i for i, value in expected.items() if value <= least + 1e-12)
    assert len(set(chosen.tolist())) > 2  # negative control: there is something to choose


def test_the_example_of_the_slides():
    """Oracle: the slides' worked numbers: (1, 0, 2, 3 | 5, 3, 1, 7) becomes (2, 0, 2, 2 | 4, 4, 4, 4), the empty bin stays empty."""
    p, q = (np.array(x) / 22 for x in ([1, 2, 3, 5, 3, 1, 7], [2, 2, 2, 4, 4, 4, 4]))
    found = divergence(torch.tensor([[1.0, 0, 2, 3, 5, 3, 1, 7]]), 2, torch.tensor([8]))
    assert float(found) == pytest.approx(float((p * np.log(p / q)).sum()))


def test_known_thresholds():
    """Oracle: by hand. Steps as wide as a level lose nothing, whatever lies beyond is kept; a fine pattern below a lone number is
    worth more than that; and a tail that ends in an empty bin can't be cut there."""
    steps = torch.tensor([8.0, 8, 6, 6, 4, 4, 2, 2])
    assert int(kl_bins(steps, 4)) == 8 and float(divergence(steps[None], 4, torch.tensor([8]))) == pytest.approx(0)
    pattern = torch.tensor([90.0, 10, 90, 10, 0, 0, 0, 1])
    assert int(kl_bins(pattern, 4)) == 4
    assert torch.isinf(divergence(pattern[None], 4, torch.tensor([5, 6, 7]))).all()


@pytest.mark.parametrize("bins", [7, 64])
def test_histograms_are_numpys(bins, generator):
    """Oracle: numpy. Rows are counted each for itself; batches that share the largest add up."""
    values = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    counts, width = magnitudes(values, bins)
    for row, found, step in zip(values.abs().numpy(), counts, width, strict=True):
        expected, edges = np.histogram(row, bins=bins, range=(0, row.max()))
        assert found.tolist() == expected.tolist()
        assert float(step) == pytest.approx(edges[1])
    largest = values.abs().amax(dim=1)
    parts = [magnitudes(part, bins, largest)[0] for part in (values[:, :50], values[:, 50:])]
    assert torch.equal(parts[0] + parts[1], counts)


def test_more_levels_than_bins_are_refused():
    with pytest.raises(ValueError, match=r"levels=9 must be 2 to 8, the number of bins"):
        kl_bins(torch.ones(8), 9)
