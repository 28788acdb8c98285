"""N:M sparsity: held by trying all masks of a group, and for the estimator by its formula and by autograd."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from refimpl.compression.protocol import compress
from refimpl.compression.pruning.sparse import Pattern
from refimpl.compression.pruning.unstructured.n_m_sparsity import NMSparsity, sparse_refined


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3)])
def test_no_other_mask_of_a_group_keeps_more(pattern, generator):
    """Oracle: brute force over the masks of every group, as NVIDIA's code finds them; exactly N of every M stay."""
    n, m = pattern
    weight = torch.randn(5, 24, generator=generator)
    dense = NMSparsity(pattern=f"{n}:{m}")(weight).dense()
    for group, pruned in zip(weight.view(-1, m), dense.view(-1, m), strict=True):
        best = max(float(group[list(kept)].abs().sum()) for kept in itertools.combinations(range(m), n))
        assert float(pruned.abs().sum()) == pytest.approx(best)
        assert int((pruned != 0).sum()) == n
        assert torch.equal(pruned[pruned != 0], group[pruned != 0])


@pytest.mark.parametrize(("columns", "last"), [(4, 2), (5, 1), (6, 2), (7, 2), (1, 1)])
def test_a_shorter_last_group_keeps_what_it_can(columns, last, generator):
    """Oracle: by hand. It is filled up with zeros, and of its own weights two stay, or one if there is only one."""
    weight = torch.randn(6, columns, generator=generator)
    dense = NMSparsity()(weight).dense()
    start = (columns - 1) // 4 * 4
    assert ((dense[:, start:] != 0).sum(dim=1) == last).all()
    assert torch.equal(dense[:, start:].abs().amax(dim=1), weight[:, start:].abs().amax(dim=1))


def test_worked_by_hand():
    """Oracle: by hand."""
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0, 0.5, 0.0, 0.0, -0.1]])
    assert NMSparsity()(weight).dense().tolist() == [[3.0, 0.0, 0.0, -4.0, 0.5, 0.0, 0.0, pytest.approx(-0.1)]]


@pytest.mark.parametrize("columns", [8, 7])
@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_gradient_is_that_of_the_masked_weight_and_a_decay_of_the_rest(decay, columns, generator):
    """Oracle: autograd with respect to the masked weight, as a weight of its own, plus the decay by hand; in float64."""
    weight = torch.randn(3, columns, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    loss = lambda w: (x @ w.T).sin().sum()  # noqa: E731
    loss(sparse_refined(weight, Pattern(2, 4), decay)).backward()
    masked = NMSparsity()(weight.detach()).dense().requires_grad_()
    loss(masked).backward()
    outside = torch.where(masked.detach() == 0, weight.detach(), 0)
    assert_close(weight.grad, masked.grad + decay * outside)
    assert outside.any() and masked.grad[masked == 0].any()  # negative control: hidden weights have both parts


def test_a_step_by_hand():
    """Oracle: by hand. 4 and 3 stay; W - 0.1 (1 + 0.5 (1 - m) W), in which 1 falls below what 2 falls to."""
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    sparse_refined(weight, Pattern(2, 4), decay=0.5).sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()
    assert_close(weight.data, torch.tensor([[3.9, 2.9, 2 - 0.1 * 2, 1 - 0.1 * 1.5]]))


def test_what_is_outside_the_mask_decays_to_nothing():
    """Oracle: closed form. Without a loss a hidden weight is multiplied by 1 - 0.1 λ in each step; the others stay."""
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (0 * sparse_refined(weight, Pattern(2, 4), decay=0.5)).sum().backward()
        optimizer.step()
    assert_close(weight.data, torch.tensor([[4.0, 3.0, 2 * 0.95**20, 0.95**20]]))


def test_the_mask_follows_the_weights():
    """Oracle: by hand. A hidden weight that grows beyond another takes its place."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.1, 1.2, 1.3]]))
    assert (sparse_refined(weight, Pattern(2, 4)) != 0).tolist() == [[False, False, True, True]]
    with torch.no_grad():
        weight[0, 0] = -9.0
    assert (sparse_refined(weight, Pattern(2, 4)) != 0).tolist() == [[True, False, False, True]]


def test_a_model_trains_as_it_is_stored(build, tokens, logits):
    """Oracle: the compressed model. Attached, a model says what it says once it is stored; detached, it still does."""
    model, method = build(), NMSparsity()
    before = logits(model, tokens)
    kept = {id(parameter) for parameter in model.parameters()}
    method.attach(model)
    assert {id(parameter) for parameter in model.parameters()} == kept  # an optimizer made before still holds them
    attached = logits(model, tokens)
    assert_close(attached, logits(compress(build(), method), tokens))
    assert not torch.allclose(attached, before)  # negative control
    method.detach(model)
    assert_close(logits(model, tokens), attached)
    assert_close(logits(compress(model, method), tokens), attached)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_some_layers_stay_dense():
    """Oracle: by hand; the names are those of the layers."""
    model, method = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), NMSparsity()
    method.attach(model, target=("0", "1"), skip=("1",))
    assert [int((layer.weight == 0).sum()) for layer in model] == [8, 0, 0]
    again = copy.deepcopy(model)
    again(torch.ones(1, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    method.detach(model)
    assert int((model[0].weight == 0).sum()) == 8 and not parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[2])  # somebody else's
    with pytest.raises(
        ValueError, match=r"target=\['9'\] with skip=\['lm_head'\] matches no linear layer; the model's"
    ):
        method.attach(model, target=("9",))


def test_a_tied_weight_stays_dense():
    """Oracle: by hand; `compress` leaves it alone too, and after `detach` it is still tied."""
    model, method = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), NMSparsity()
    model[2].weight = model[0].weight
    method.attach(model)
    assert [int((model[i].weight == 0).sum()) for i in (1, 2)] == [8, 0]
    method.detach(model)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result, cast; also of the estimator."""
    weight = torch.randn(5, 16, generator=generator).to(dtype)
    expected = NMSparsity()(weight.float()).dense().to(dtype)
    assert torch.equal(NMSparsity()(weight).dense(), expected)
    assert torch.equal(sparse_refined(weight, Pattern(2, 4)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "4:4"}, "must be 'N:M' with 1 <= N < M <= 256"),
        ({"pattern": 0.5}, "pattern=0.5 must be 'N:M', as '2:4'; a share is magnitude's `sparsity`"),
        ({"decay": -1.0}, "decay=-1.0 must be 0 or more; the paper uses 2e-4"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        NMSparsity(**change)


def test_claim_storage(claim, generator):
    """Bytes of a 2:4 weight over those of the dense one, in 16 bits."""
    weight = torch.randn(64, 128, generator=generator).half()
    claim("n-m-sparsity", "storage", NMSparsity()(weight).nbytes / weight.nbytes)


def task(generator):
    """Ten classes of four clusters each in 32 dimensions, and a network of three layers that is to learn them."""
    centres, which = torch.randn(40, 32, generator=generator), torch.randint(40, (8192,), generator=generator)
    x, y = centres[which] + 0.9 * torch.randn(8192, 32, generator=generator), which % 10
    layers = [nn.Linear(*size) for size in ((32, 128), (128, 128), (128, 10))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), x, y


def trained(start, x, y, method=None, steps=300, schedule=lambda progress: 1 - progress):
    """The network after some steps of SGD with momentum, and how many weights of its first layer entered or left the mask, seen
    every 50 steps."""
    model, generator, changes = copy.deepcopy(start), torch.Generator().manual_seed(1), 0
    if method:
        method.attach(model, skip=("4",))
    mask = model[0].weight != 0
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step / steps)
        batch = torch.randint(4096, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step % 50 == 49:
            before, mask = mask, model[0].weight != 0
            changes += int((before != mask).sum())
    return model, changes


def test_claim_calmer_masks(claim, generator):
    """Changes of a mask in 600 steps, SR-STE over the plain estimator."""
    start, x, y = task(generator)
    refined, plain = (trained(start, x, y, NMSparsity(decay=d), 600, lambda _: 1.0)[1] for d in (2e-4, 0.0))
    claim("n-m-sparsity", "calmer-masks", refined / plain)


def test_claim_as_accurate_as_dense(claim, generator):
    """Points of accuracy that a network trained under 2:4 loses against the dense one; pruned once, it would lose more."""
    start, x, y = task(generator)
    accuracy = lambda model: 100 * float((model(x[4096:]).argmax(dim=1) == y[4096:]).float().mean())  # noqa: E731
    dense, sparse = trained(start, x, y)[0], trained(start, x, y, NMSparsity())[0]
    assert accuracy(sparse) > accuracy(compress(dense, NMSparsity(), skip=("4",)))
    claim("n-m-sparsity", "as-accurate-as-dense", accuracy(dense) - accuracy(sparse))
