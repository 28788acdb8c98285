"""What holds for every precision policy, and for forward and backward on copies; the list of policies is the taxonomy's."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import FullPrecision, next_token_loss, train
from refimpl.pretraining.mixed_precision.protocol import CopiedWeights
from refimpl.pretraining.protocol import parameter_groups

TREE = taxonomy.load()
METHODS = TREE.find(category="pretraining/mixed_precision", implemented=True)
OPTIMIZERS = TREE.find(category="pretraining/optimizers", implemented=True)
BATCH = torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def entry(request):
    """A policy as the taxonomy knows it."""
    return request.param


@pytest.fixture
def method(entry):
    """The policy at its default settings."""
    return entry.load()()


def model(tied=True):
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 20}
    net = Decoder(Config(vocabulary=13, tied_embeddings=tied, **sizes))
    return initialize_(net, torch.Generator().manual_seed(0), std=0.2)


def gradients(net, session, batch=BATCH):
    net.zero_grad()
    loss = session.backward(net, next_token_loss, batch)
    return loss, torch.cat([p.grad.flatten() for p in net.parameters()])


def test_there_are_policies():
    assert METHODS


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_unscaled_loss(method, tied):
    """Oracle: float32, to a share that 8-bit formats reach; and they are not float32's own."""
    net = model(tied)
    loss, exact = gradients(net, FullPrecision())
    session, still = method.start(net), torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(8):  # a scale that is searched may begin too high
        rounded_loss, rounded = gradients(net, session)
        session.update(still)
    assert rounded_loss == pytest.approx(float(loss), rel=0.05) and not rounded_loss.requires_grad
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.2
    assert_close(rounded.norm(), exact.norm(), rtol=0.05, atol=0)  # as above: the scale is divided out


def test_backward_moves_nothing_and_leaves_the_models_own_parameters(method):
    """Oracle: the model before, tensor by tensor."""
    net = model()
    twice = nn.Sequential(*[nn.Linear(4, 4)] * 2)
    for module, loss, batch in ((net, next_token_loss, BATCH), (twice, lambda f, x: f(x).sum(), torch.ones(1, 4))):
        held, before = dict(module.named_parameters()), {n: p.detach().clone() for n, p in module.named_parameters()}
        method.start(module).backward(module, loss, batch)
        after = dict(module.named_parameters())
        assert all(after[name] is p and torch.equal(p, before[name]) for name, p in held.items())


def test_a_loss_that_raises_leaves_the_model_as_it_was(method):
    net = model()
    held, session = dict(net.named_parameters()), method.start(net)
    with pytest.raises(ZeroDivisionError):
        session.backward(net, lambda model, batch: model(batch).sum() * (1 // 0), BATCH)
    assert all(p is held[name] and p.grad is None for name, p in net.named_parameters())
    assert torch.equal(gradients(net, session)[1], gradients(net, method.start(net))[1])


def test_gradients_add_up_over_batches(method):
    """Oracle: the sum of each batch's own."""
    net, other = model(), torch.roll(BATCH, 1)
    parts = [gradients(net, method.start(net), batch)[1] for batch in (BATCH, other)]
    session = method.start(net)
    net.zero_grad()
    for batch in (BATCH, other):
        session.backward(net, next_token_loss, batch)
    assert_close(torch.cat([p.grad.flatten() for p in net.parameters()]), parts[0] + parts[1])


def test_frozen_parameters_get_no_gradient(method):
    net = model()
    net.layers[0].requires_grad_(False)
    method.start(net).backward(net, next_token_loss, BATCH)
    assert all((p.grad is None) == name.startswith("layers.0.") for name, p in net.named_parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda method: method.id)
def test_every_optimizer_trains_under_it(method, optimizer):
    """Oracle: float32 training from the same start, and the loss it began with."""
    net, reference = model(), model()
    text = ((torch.arange(9) + torch.arange(3)[:, None]) % 13,) * 15
    ours = optimizer.load()(parameter_groups(net), lr=0.01)
    theirs = optimizer.load()(parameter_groups(reference), lr=0.01)
    losses = train(net, ours, text, 15, precision=method.start(net))
    exact = train(reference, theirs, text, 15)
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] == pytest.approx(exact[-1], rel=0.25)


def test_saved_and_loaded_goes_on_bit_for_bit(method):
    """Oracle: the training that was not interrupted."""

    def start(net):
        return torch.optim.SGD(net.parameters(), lr=0.1), method.start(net)

    net, text = model(), [torch.roll(BATCH, i) for i in range(6)]
    optimizer, session = start(net)
    train(net, optimizer, text[:3], 3, precision=session)
    again = copy.deepcopy(net)
    second, resumed = start(again)
    resumed.load_state_dict(session.state_dict())
    train(net, optimizer, text[3:], 3, precision=session)
    train(again, second, text[3:], 3, precision=resumed)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert session.state_dict() == resumed.state_dict()


def test_parameters_that_are_changed_from_outside_count(method):
    """Oracle: a training begun with the changed weights; a checkpoint loaded between steps must not be overlooked."""
    net = model()
    session = method.start(net)
    gradients(net, session)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    assert torch.equal(gradients(net, session)[1], gradients(net, method.start(net))[1])


def test_a_model_that_is_not_float32_is_refused(method):
    with pytest.raises(ValueError, match=r"'embedding.weight' is torch.bfloat16.*model.float"):
        method.start(model().bfloat16())


def test_another_model_is_refused(method):
    session = method.start(model())
    with pytest.raises(ValueError, match="another model"):
        session.backward(model(), next_token_loss, BATCH)


def test_works_on_any_module(method):
    """Oracle: float32. Floating-point inputs, a bias, a parameter that the loss does not reach, whole numbers held fixed."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
            self.unused = nn.Parameter(torch.ones(3))
            self.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)

        def forward(self, x):
            return self.inner(x) * self.codes

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 4)

    def loss(net, batch):
        return net(batch).float().square().mean()

    FullPrecision().backward(net, loss, x)
    exact = [p.grad.clone() for p in net.inner.parameters()]
    net.zero_grad()
    method.start(net).backward(net, loss, x)
    for p, g in zip(net.inner.parameters(), exact, strict=True):
        assert (p.grad - g).norm() < 0.2 * g.norm() + 1e-3  # as above
    assert net.unused.grad is None and net.codes.dtype == torch.int64


def test_bytes_are_those_of_the_copies():
    """Oracle: by hand. 4 x 3 weights and 3 biases, tied twice, 2 bytes each."""
    layer = nn.Linear(4, 3)
    net = nn.Sequential(layer, nn.Linear(3, 4), layer)
    session = CopiedWeights(net, torch.bfloat16)
    assert session.nbytes == 2 * (4 * 3 + 3 + 3 * 4 + 4)
    assert {c.dtype for c in session.copies.values()} == {torch.bfloat16}


def test_tied_weights_share_a_copy():
    """Oracle: by hand, f(w) = (w x) w at w = 3, x = 1: slope 2 w = 6, not 3."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 3.0)
    net = nn.Sequential(layer, layer)
    CopiedWeights(net, torch.bfloat16).backward(net, lambda net, x: net(x).sum(), torch.ones(1, 1))
    assert layer.weight.grad.item() == 6.0
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.dtype == torch.float32  # its own again


def test_forward_sees_the_low_precision():
    """Oracle: by hand, 1 + 2**-9 is 1 in bfloat16; loss and activations are in it, too."""
    net, seen = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(net.weight, 1 + 2.0**-9)

    def loss(net, x):
        seen.append((net.weight.dtype, x.dtype, net(x).dtype))
        return net(x).sum()

    assert CopiedWeights(net, torch.bfloat16).backward(net, loss, torch.ones(1, 1)).item() == 1.0
    assert seen == [(torch.bfloat16,) * 3]
