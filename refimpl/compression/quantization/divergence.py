r"""How many bins of a histogram a grid should cover, so that what it makes of them tells least apart from what they hold.

Source: `tensorrt-int8-2017`, "Entropy Calibration - pseudocode"; what the slides leave open is taken from NVIDIA's code, as
`refimpl/compression/quantization/observers.py` says, whose `kl_range` makes a threshold of the bins.

Differs from the paper: candidates begin at as many bins as there are levels, also where these are not 128.

Not here: thresholds; smoothing of empty bins.
"""

import torch
from torch import Tensor

BINS = 2048  # of a histogram of magnitudes
AT_ONCE = 2**22  # numbers that a step may hold


def magnitudes(values: Tensor, bins: int = BINS, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Histogram of $|x|$, from 0 to the largest, in bins of equal width.

    Args:
        values: `[..., n]`, each row for itself.
        bins: how many.
        largest: `[...]`, where the last bin ends, for counts of several batches to be added up; None: at the largest magnitude.

    Returns:
        Counts `[..., bins]`, float64 holding integers, and the width of a bin `[...]`, float64.

    Examples:
        >>> magnitudes(torch.tensor([0.0, -1.0, 1.5, 4.0]), bins=4)
        (tensor([1., 2., 0., 1.], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    size = values.double().abs()
    largest = size.amax(dim=-1) if largest is None else largest.double()
    width = (largest / bins).clamp(min=torch.finfo(torch.float64).tiny)
    place = (size / width[..., None]).long().clamp_(max=bins - 1).view(-1, size.shape[-1])
    place += torch.arange(len(place), device=place.device)[:, None] * bins
    counts = torch.bincount(place.flatten(), minlength=largest.numel() * bins)
    return counts.double().view(*largest.shape, bins), width


def kl_bins(counts: Tensor, levels: int) -> Tensor:
    r"""The number $i$ of bins that a grid of magnitudes should cover, $\operatorname{argmin}_i D_{KL}(P_i \| Q_i)$.

    $P_i$ are the first i bins, with the count of all others added to the last. $Q_i$ are the first i bins alone, merged to `levels`
    levels, bin j to level $\lfloor j \cdot \text{levels} / i \rfloor$; each level's count is spread over those of its bins that
    are not empty. A candidate whose last bin is empty, and which has some beyond, diverges infinitely. Sums over bins are differences
    of running sums, so that a candidate costs as much as it has levels.

    Args:
        counts: `[..., bins]`, histograms of magnitudes.
        levels: at least 2, 128 for 8 bits with a sign; candidates are `levels` to `bins`.

    Returns:
        i, `[...]`, the greatest of those whose divergence is least.

    Raises:
        ValueError: there are fewer bins than levels.

    Examples:
        With all eight bins, levels of two would lose the difference between 12 and 2; without the last four, one number is clipped.

        >>> kl_bins(torch.tensor([12.0, 2.0, 12.0, 2.0, 0.0, 0.0, 0.0, 1.0]), 4)
        tensor(4)
    """
    bins = counts.shape[-1]
    if not 2 <= levels <= bins:
        raise ValueError(f"levels={levels} must be 2 to {bins}, the number of bins")
    tried = torch.arange(levels, bins + 1, device=counts.device)
    rows = counts.reshape(-1, bins)
    parts = [divergence(part, levels, tried) for part in torch.split(rows, max(1, AT_ONCE // (len(tried) * levels)))]
    lost = torch.cat(parts)
    equal = lost <= lost.amin(dim=1, keepdim=True) + 1e-12  # to rounding
    return torch.where(equal, tried, 0).amax(dim=1).view(counts.shape[:-1])


def divergence(counts: Tensor, levels: int, tried: Tensor) -> Tensor:
    r"""$D_{KL}(P_i \| Q_i)$ of candidates i, as `kl_bins` defines them.

    Args:
        counts: `[rows, bins]`.
        levels: as in `kl_bins`.
        tried: i of each candidate.

    Returns:
        In nats, `[rows, len(tried)]`, float64.

    Examples:
        P is (2, 6) / 8 and Q is (3, 3) / 6:

        >>> divergence(torch.tensor([[2.0, 4.0, 2.0]]), 1, torch.tensor([2])).round(decimals=3).tolist()
        [[0.131]]
    """
    counts = counts.double()

    def running(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(len(x), 1), x.cumsum(dim=1)], dim=1)

    total, terms = counts.sum(dim=1, keepdim=True).clamp(min=1), running(torch.xlogy(counts, counts))
    edges = (
        torch.arange(levels + 1, device=counts.device) * tried[:, None] + levels - 1
    ) // levels  # [tried, levels + 1]
    mass = running(counts)[:, edges].diff(dim=2)
    height = mass / running((counts > 0).double())[:, edges].diff(dim=2).clamp(min=1)
    last = counts[:, tried - 1]
    inside = running(counts)[:, tried]
    outside = total - inside
    p_log_p = terms[:, tried - 1] + torch.xlogy(last + outside, last + outside) - torch.xlogy(total, total)
    p_log_q = torch.xlogy(mass, height).sum(dim=2) + torch.xlogy(outside, height[..., -1]) - torch.xlogy(total, inside)
    return torch.where((last > 0) | (outside == 0), (p_log_p - p_log_q) / total, torch.inf)
