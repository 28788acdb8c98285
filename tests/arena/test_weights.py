"""The layer on which weight compression is measured."""

import torch

from refimpl.arena import weights


def test_substrate_has_the_outliers_it_promises(generator):
    """Oracle: the definition. Eight channels are far larger than the median, the rest are not; inputs are correlated."""
    weight, inputs = weights.substrate(generator)
    size = inputs.norm(dim=0)
    assert (size > 8 * size.median()).sum() == 8
    ordinary = inputs[:, size < 8 * size.median()]
    spectrum = torch.linalg.svdvals(ordinary)
    assert spectrum[:64].square().sum() / spectrum.square().sum() > 0.8
    assert weight.shape == (256, 512)


def test_baseline_is_16_bit():
    """Oracle: arithmetic. Two bytes a weight, compression 1, an error of the order of 2^-9."""
    figures = weights.baseline(torch.Generator().manual_seed(0), torch.device("cpu"))
    assert figures["bytes"] == 2 * 256 * 512
    assert figures["compression"] == 1
    assert 1e-4 < figures["weight_error"] < 2**-8
