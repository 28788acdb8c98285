"""Magnitude pruning: held by trying all masks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refimpl.compression.protocol import compress
from refimpl.compression.pruning.unstructured.magnitude import Magnitude


@pytest.mark.parametrize("removed", [0, 1, 4, 7])
def test_no_other_mask_is_nearer_to_the_weight(removed, generator):
    """Oracle: brute force over all masks with as many zeros."""
    weight = torch.randn(2, 4, generator=generator)
    distances = []
    for places in itertools.combinations(range(8), removed):
        other = weight.flatten().clone()
        other[list(places)] = 0
        distances.append(float((other - weight.flatten()).norm()))
    dense = Magnitude(sparsity=removed / 8)(weight).dense()
    assert int((dense == 0).sum()) == removed
    assert float((dense - weight).norm()) == pytest.approx(min(distances))
    assert torch.equal(dense[dense != 0], weight[dense != 0])


def test_worked_by_hand():
    """Oracle: by hand. In the layer, 1, 2 and 3 are the smallest; in the rows, 1 and 2, then 4 and 5."""
    weight = torch.tensor([[1.0, -2.0, 3.0, -8.0], [4.0, -5.0, 6.0, 7.0]])
    assert Magnitude(sparsity=0.4)(weight).dense().tolist() == [[0.0, 0.0, 0.0, -8.0], [4.0, -5.0, 6.0, 7.0]]
    rows = Magnitude(sparsity=0.5, compare="row")(weight).dense()
    assert rows.tolist() == [[0.0, 0.0, 3.0, -8.0], [0.0, 0.0, 6.0, 7.0]]


@pytest.mark.parametrize("compare", ["layer", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.999])
def test_exactly_the_share_goes(compare, sparsity, generator):
    """Oracle: arithmetic, rounded down, though all weights are equal in size but for a few."""
    weight = torch.randint(0, 2, (7, 30), generator=generator) * 2.0 - 1
    kept = Magnitude(sparsity=sparsity, compare=compare)(weight).dense() != 0
    if compare == "layer":
        assert int((~kept).sum()) == int(210 * sparsity)
    else:
        assert (~kept).sum(dim=1).tolist() == [int(30 * sparsity)] * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result, cast; half of the bytes go, and a bit a place is added."""
    weight = torch.randn(5, 16, generator=generator).to(dtype)
    pruned = Magnitude()(weight.T)
    assert torch.equal(pruned.dense(), Magnitude()(weight.T.float()).dense().to(dtype))
    assert pruned.nbytes == weight.nbytes / 2 + 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 must be 0 \(no weight is removed\) to below 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": "2:4"}, "must be a share of the weights; patterns are n-m-sparsity's"),
        ({"compare": "model"}, "compare='model' must be 'layer' or 'row'"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(**change)


def test_claim_half_is_free(claim, generator):
    """Points of accuracy lost with half of the weights, without training again, by a LeNet-300-100 as in the paper, trained with
    weight decay on ten classes of four clusters each."""
    centres, which = torch.randn(40, 784, generator=generator), torch.randint(40, (6144,), generator=generator)
    x, y = centres[which] + 2 * torch.randn(6144, 784, generator=generator), which % 10
    layers = [nn.Linear(*sizes) for sizes in ((784, 300), (300, 100), (100, 10))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(150):
        batch = torch.randint(4096, (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    accuracy = lambda judged: 100 * float((judged(x[4096:]).argmax(dim=1) == y[4096:]).float().mean())  # noqa: E731
    whole, half, little = (accuracy(compress(model, Magnitude(sparsity=share))) for share in (0.0, 0.5, 0.9))
    assert whole > 95 and little < 80  # there is something to lose
    claim("magnitude", "half-is-free", whole - half)
