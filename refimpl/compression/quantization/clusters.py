r"""Channels in clusters of like ranges, found by k-means, and grids that the channels of a cluster share.

Source: `rptq` (arXiv 2304.01089), the section on clustering and reordering of channels: they are clustered by their greatest and
least values, and each cluster has a scale and a zero point; official code hahnyuan/RPTQ4LLM@96190691f02be6b27ba24d5a73574dbf9a8336c6, quantize/reorder_utils.py (k-means of
scikit-learn with 10 restarts) and quantizer.py.

Differs from the paper: $2^{bits} - 1$ steps span a cluster's range, where the official code takes $2^{bits}$ and clips the uppermost. Seeds
are drawn as k-means++ draws them, where scikit-learn takes the best of several such draws.

Not here: ranges that are moving averages; searched ranges.
"""

import torch
from torch import Tensor, nn

RESTARTS, ITERATIONS = 10, 300


def kmeans(points: Tensor, clusters: int, *, restarts: int = RESTARTS, seed: int = 0) -> Tensor:
    """Which cluster each point is in: of the restarts that with the least sum of squared distances to the clusters' means.

    Args:
        points: `[sets, n, features]`; each set is clustered for itself.
        clusters: at most so many, 1 or more.
        restarts: of Lloyd's iterations, from seeds drawn by k-means++.
        seed: of these draws.

    Returns:
        `[sets, n]`, counted from 0; no cluster is empty, so that there are fewer where points coincide.

    Raises:
        ValueError: there are no points or no clusters.

    Examples:
        >>> kmeans(torch.tensor([[[0.0], [9.0], [0.5], [9.5], [10.0]]]), 2).tolist()
        [[0, 1, 0, 1, 1]]
    """
    if points.ndim != 3 or not points.numel():
        raise ValueError(f"points of shape {tuple(points.shape)} must be [sets, n, features], not empty")
    if clusters < 1 or restarts < 1:
        raise ValueError(f"clusters={clusters} and restarts={restarts} must be at least 1")
    sets, n, features = points.shape
    generator = torch.Generator(points.device).manual_seed(seed)
    x = points.double()[:, None].expand(sets, restarts, n, features).reshape(-1, n, features)
    centres = _seeds(x, min(clusters, n), generator)
    labels = torch.cdist(x, centres).argmin(dim=-1)
    for _ in range(ITERATIONS):
        centres = _means(x, labels, centres)
        before, labels = labels, torch.cdist(x, centres).argmin(dim=-1)
        if torch.equal(labels, before):
            break
    inertia = torch.cdist(x, centres).amin(dim=-1).square().sum(dim=-1).view(sets, restarts)
    best = labels.view(sets, restarts, n)[torch.arange(sets, device=x.device), inertia.argmin(dim=1)]
    return torch.stack([_renumbered(row) for row in best])


class ClusterGrids(nn.Module):
    """A grid for each cluster of channels, fixed for all calls.

    Args:
        labels: `[channels]`, the cluster of each, counted from 0.
        low: `[channels]`, least value of each.
        high: `[channels]`, greatest.
        bits: 1 to 8.

    Examples:
        >>> grids = ClusterGrids(torch.tensor([0, 0, 1]), torch.tensor([-1.0, 0.0, 30.0]), torch.tensor([0.0, 2.0, 36.0]), 2)
        >>> grids.read(torch.tensor([[0.6, 1.7, 31.5], [-5.0, 5.0, 5.0]])).tolist()
        [[1.0, 2.0, 32.0], [-1.0, 2.0, 30.0]]
    """

    labels: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, labels: Tensor, low: Tensor, high: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        clusters, labels = int(labels.max()) + 1, labels.long()
        least = low.new_empty(clusters).scatter_reduce(0, labels, low, "amin", include_self=False)
        greatest = high.new_empty(clusters).scatter_reduce(0, labels, high, "amax", include_self=False)
        scale = (greatest - least) / (2**bits - 1)
        smallest = torch.maximum(-least, greatest).clamp(min=torch.finfo(torch.float32).tiny) / 2**20
        scale = torch.maximum(
            scale, smallest
        )  # channels that hardly move have no step of 0, nor a zero point beyond all bounds
        self.register_buffer("labels", labels.to(torch.int16 if clusters <= 2**15 else torch.int32))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", (-least / scale).round())

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `[..., channels]`, float32 holding integers from 0 to 2^bits - 1."""
        labels = self.labels.int()
        codes = (x.float() / self.scale[labels]).round_().add_(self.zero[labels])
        return codes.clamp_(0, 2**self.bits - 1)

    def read(self, x: Tensor) -> Tensor:
        """The rounded values, in the dtype of x."""
        labels = self.labels.int()
        return self.codes(x).sub_(self.zero[labels]).mul_(self.scale[labels]).to(x.dtype)


def _seeds(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres drawn among the points, each with a chance in proportion to its squared distance to those before (k-means++)."""
    rows = torch.arange(len(x), device=x.device)
    drawn = torch.randint(x.shape[1], (len(x),), generator=generator, device=x.device)
    centres = [x[rows, drawn]]
    nearest = (x - centres[0][:, None]).square().sum(dim=-1)
    for _ in range(clusters - 1):
        chance = torch.where(nearest.sum(dim=1, keepdim=True) > 0, nearest, 1.0)  # all points coincide with centres
        centres.append(x[rows, torch.multinomial(chance, 1, generator=generator)[:, 0]])
        nearest = torch.minimum(nearest, (x - centres[-1][:, None]).square().sum(dim=-1))
    return torch.stack(centres, dim=1)


def _means(x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Mean of each cluster's points; an empty one keeps its centre."""
    index = labels[..., None].expand_as(x)
    sums = torch.zeros_like(centres).scatter_add(1, index, x)
    counts = torch.zeros_like(centres).scatter_add(1, index, torch.ones_like(x))
    return torch.where(counts > 0, sums / counts.clamp(min=1), centres)


def _renumbered(labels: Tensor) -> Tensor:
    """The same clusters, numbered in the order in which they first occur."""
    first = torch.full((int(labels.max()) + 1,), len(labels), device=labels.device)
    first.scatter_reduce_(0, labels, torch.arange(len(labels), device=labels.device), "amin")
    return first.argsort().argsort()[labels]
