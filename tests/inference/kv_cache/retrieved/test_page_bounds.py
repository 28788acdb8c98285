"""Bounds of pages: that they bound, how tightly, and that they are kept up."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.retrieved.page_bounds import PageBounds


def filled(k, size, sizes):
    bounds = PageBounds(size)
    for part in k.split(sizes, dim=2):
        bounds.append(part)
    return bounds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_key_of_a_page_exceeds_its_bound(dtype, generator):
    """Oracle: brute force: the product of each query head with every key of the page."""
    k = (torch.randn(2, 2, 37, 8, generator=generator) + 1).to(dtype)
    query = torch.randn(2, 6, 8, generator=generator).to(dtype)
    upper = filled(k, 5, 37).upper(query, 8)
    products = query.unsqueeze(2).double() @ k.double().repeat_interleave(3, dim=1).mT  # [r, h, 1, tokens]
    best = torch.stack([part.amax(dim=(2, 3)) for part in products.split(5, dim=3)], dim=2)
    assert upper.shape == best.shape
    assert (upper - best).min() >= 0
    assert (upper - best).mean() > 0.1  # negative control: looser than the keys themselves


def test_the_bound_is_the_best_corner_of_the_box(generator):
    """Oracle: brute force: the largest product among the corners of the box that m and M span, which no smaller bound of a box beats."""
    k, query = (torch.randn(1, 1, n, 4, generator=generator, dtype=torch.float64) for n in (7, 1))
    least, greatest = k[0, 0].amin(dim=0), k[0, 0].amax(dim=0)
    corners = torch.stack([torch.stack(corner) for corner in itertools.product(*zip(least, greatest, strict=True))])
    assert_close(filled(k, 7, 7).upper(query[:, :, 0], 1)[0, 0, 0], (corners @ query[0, 0, 0]).max())


def test_a_page_of_one_key_is_bounded_by_its_score(generator):
    """Oracle: the products themselves, which the bound then is."""
    k, query = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (9, 1))
    assert_close(filled(k, 1, 4).upper(query[:, :, 0], 9), (query @ k.mT)[:, :, 0])


@pytest.mark.parametrize("sizes", [[1] * 33, [7, 1, 1, 13, 11], [4, 4, 25], 33])
def test_kept_up_as_computed_anew(sizes, generator):
    """Oracle: minimum and maximum of each page's keys, taken at the end."""
    k = torch.randn(2, 2, 33, 3, generator=generator)
    bounds, pages = filled(k, 4, sizes), k.split(4, dim=2)
    assert bounds.pages == 9
    assert torch.equal(bounds.least, torch.stack([page.amin(dim=2) for page in pages], dim=2))
    assert torch.equal(bounds.greatest, torch.stack([page.amax(dim=2) for page in pages], dim=2))
