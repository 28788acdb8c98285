"""The layers that low-rank model methods factor: those that the family's driver takes."""

import pytest
import torch
from torch import nn

from refimpl.compression.low_rank.factored import WholeWeight
from refimpl.compression.low_rank.layers import linear_layers, replace_weight
from refimpl.compression.protocol import CompressedLinear, compress


def test_they_are_those_of_the_driver(build):
    """Oracle: `compress`, which says the name of each layer that it has compressed; the output layer is none of them."""
    names = []
    compress(build(), lambda weight, inputs: WholeWeight(weight), done=names.append)
    assert list(linear_layers(build())) == names
    assert len(names) >= 8 and "lm_head" not in names


def test_weights_under_two_names_are_left():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    assert list(linear_layers(model)) == ["1"]


def test_a_weight_is_replaced_and_the_bias_kept(generator):
    """Oracle: the layer itself."""
    model, x = nn.Sequential(nn.Linear(5, 7)), torch.randn(3, 5, generator=generator)
    before = model(x)
    replace_weight(model, "0", WholeWeight(model[0].weight.detach()))
    assert isinstance(model[0], CompressedLinear)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace_weight(m, "0", WholeWeight(m[0].weight.detach())), "layer '0' is compressed already"),
        (lambda m: m[0].weight.data.fill_(float("nan")), "weight holds NaN or infinity"),
        (lambda m: m.__delitem__(0), "matches no linear layer"),
    ],
)
def test_what_can_not_be_factored_is_refused(change, message):
    model = nn.Sequential(nn.Linear(5, 7))
    change(model)
    with pytest.raises(ValueError, match=message):
        linear_layers(model)


def test_integers_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer '0' holds torch\.int8"):
        linear_layers(model)
