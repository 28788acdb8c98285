"""k-means against every way to cluster a few points, and grids of clusters against their definition."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.quantization.clusters import ClusterGrids, kmeans


def inertia(points, labels):
    """Sum of squared distances to the means of the clusters."""
    return sum(
        float((points[labels == label] - points[labels == label].mean(0)).square().sum()) for label in labels.unique()
    )


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_best_of_all_ways_to_cluster(clusters, generator):
    """Oracle: brute force over all assignments of seven points, three sets at once. Control: a single restart is worse somewhere."""
    points = torch.randn(3, 7, 2, generator=generator)
    ways = torch.tensor(list(itertools.product(range(clusters), repeat=7)))
    member = torch.nn.functional.one_hot(ways, clusters).float()  # [ways, 7, clusters]
    counts = member.sum(1).clamp(min=1)
    for own, labels in zip(points, kmeans(points, clusters), strict=True):
        sums = torch.einsum("wnc,nf->wcf", member, own)
        best = (own.square().sum() - (sums.square().sum(2) / counts).sum(1)).min()  # Huygens
        assert_close(inertia(own, labels), float(best), rtol=1e-4, atol=1e-5)
        assert labels.unique().tolist() == list(range(clusters))
    single = sum(
        inertia(own, row) for own, row in zip(points, kmeans(points, clusters, restarts=1, seed=3), strict=True)
    )
    assert single >= sum(map(inertia, points, kmeans(points, clusters))) - 1e-4


def test_planted_clusters_are_found(generator):
    """Oracle: how the points were made: 32 heaps of 20, a hundred times further apart than wide."""
    planted = torch.arange(32).repeat(20)
    centres = torch.stack([torch.arange(32.0) % 6, torch.arange(32.0) // 6], dim=1) * 100
    labels = kmeans((centres[planted] + torch.randn(640, 2, generator=generator))[None], 32)[0]
    pairs = {(a, b) for a, b in zip(planted.tolist(), labels.tolist(), strict=True)}
    assert len(pairs) <= 34 and len(labels.unique()) == 32  # a heap or two may be cut, never mixed everywhere


def test_few_or_coinciding_points():
    """Oracle: counting. No cluster is empty, and equal points are never apart."""
    assert kmeans(torch.tensor([[[1.0], [1.0], [5.0], [1.0]]]), 3).tolist() == [[0, 0, 1, 0]]
    assert kmeans(torch.tensor([[[1.0], [2.0]]]), 32).tolist() == [[0, 1]]
    assert kmeans(torch.zeros(2, 3, 2), 2).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("points", "clusters", "message"),
    [
        (torch.zeros(1, 0, 2), 2, "must be \\[sets, n, features\\], not empty"),
        (torch.zeros(3, 2), 2, "must be \\[sets, n, features\\]"),
        (torch.zeros(1, 3, 2), 0, "clusters=0 and restarts=10 must be at least 1"),
    ],
)
def test_bad_points_are_refused(points, clusters, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, clusters)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_each_channel_is_on_its_clusters_grid(bits, generator):
    """Oracle: the definition in float64, cluster by cluster; no value in its range moves by more than half a step."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.randn(50, 6, generator=generator) * torch.tensor([1.0, 2, 1, 30, 20, 0.1]) + torch.tensor(
        [0.0, 0, 1, 9, 9, 50]
    )
    grids = ClusterGrids(labels, x.amin(0), x.amax(0), bits)
    read = grids.read(x)
    for label in range(3):
        own = x[:, labels == label].double()
        step = (own.max() - own.min()) / (2**bits - 1)
        expected = ((own / step).round() + (-own.min() / step).round()).clamp(0, 2**bits - 1)
        expected = (expected - (-own.min() / step).round()) * step
        assert_close(read[:, labels == label].double(), expected, rtol=1e-5, atol=1e-5)
        assert (read[:, labels == label] - own).abs().max() < 1.01 * step  # half a step, and half of one at the ends
    assert (grids.codes(x) == grids.codes(x).round()).all() and grids.codes(x).max() == 2**bits - 1
    assert grids.zero[2] < 0 or grids.zero[2] > 2**bits  # negative control: 50 is far from 0, which is no level there


def test_a_channel_that_does_not_move():
    """Oracle: by hand: a constant and zeros come back; nothing is divided by 0."""
    low = torch.tensor([3.0, 3.0, 0.0])
    read = ClusterGrids(torch.tensor([0, 0, 1]), low, low, 4).read(torch.tensor([[3.0, 3.0, 0.0]]))
    assert_close(read, torch.tensor([[3.0, 3.0, 0.0]]), rtol=1e-6, atol=0)
