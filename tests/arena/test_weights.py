"""The layer on which weight compression is measured."""

from pathlib import Path

import pytest
import torch

from refimpl.arena import weights
from refimpl.arena.protocol import Conditions
from refimpl.compression.quantization.weight_only.awq import AWQ
from refimpl.compression.quantization.weight_only.rtn import RTN


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
    figures = weights.baseline(Conditions(torch.Generator().manual_seed(0)))
    assert figures["bytes"] == 2 * 256 * 512
    assert figures["compression"] == 1
    assert 1e-4 < figures["weight_error"] < 2**-8


def test_methods_meet_the_same_layer_quick_or_not():
    """Oracle: a second draw from the seed. All but the time repeats, however often that is taken."""
    short, full = (
        weights.measure(RTN, {"bits": 3}, Conditions(torch.Generator().manual_seed(1), quick=quick))
        for quick in (True, False)
    )
    exact = [metric.name for metric in weights.METRICS if metric.exact]
    assert [short[name] for name in exact] == [full[name] for name in exact]
    assert 0.01 < short["output_error"] < 1 and short["seconds"] > 0


def test_a_model_is_refused():
    with pytest.raises(ValueError, match=r"--model here: this arena's substrate is synthetic"):
        weights.baseline(Conditions(torch.Generator(), model=Path("here")))


def test_a_method_of_whole_models_takes_part_by_its_layer():
    """Oracle: AWQ's layer form, called on the arena's layer; its call on a model can't take a weight."""
    figures = weights.measure(AWQ, {"bits": 3}, Conditions(torch.Generator().manual_seed(0), quick=True))
    weight, inputs = weights.substrate(torch.Generator().manual_seed(0))
    held = AWQ(bits=3).layer(weight, inputs)
    output = inputs @ weight.T
    assert figures["bytes"] == held.nbytes
    assert figures["output_error"] == pytest.approx(float((inputs @ held.dense().T - output).norm() / output.norm()))
