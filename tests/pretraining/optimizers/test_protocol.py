"""What holds for every optimizer; the list of optimizers is the taxonomy's."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import next_token_loss, train
from refimpl.pretraining.optimizers import protocol
from refimpl.pretraining.protocol import parameter_groups, state_bytes

METHODS = taxonomy.load().find(category="pretraining/optimizers", implemented=True)
CONFIG = Config(vocabulary=13, d_model=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=20)


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def entry(request):
    """An optimizer as the taxonomy knows it."""
    return request.param


@pytest.fixture
def method(entry):
    """The optimizer's class; `method(groups)` is the optimizer at its default settings."""
    return entry.load()


def model(dtype=torch.float32):
    return initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.1).to(dtype)


def batches(n, seed=1):
    return list(torch.randint(0, 13, (n, 3, 8), generator=torch.Generator().manual_seed(seed)))


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def gradient(module, batch, optimizer):
    optimizer.zero_grad()
    next_token_loss(module, batch).backward()


def test_there_are_optimizers():
    assert METHODS


def test_nothing_moves_without_a_step(method):
    """Oracle: the parameters before, bit by bit; then a step, which moves every one of them."""
    net = model()
    before, optimizer = values(net), method(parameter_groups(net))
    gradient(net, batches(1)[0], optimizer)
    assert equal(values(net), before)
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in values(net).items())


def test_no_gradient_signal_moves_nothing(method):
    """Oracle: at a stationary point, without decay, there is nowhere to go."""
    net = model()
    before, optimizer = values(net), method(parameter_groups(net, weight_decay=0.0))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert equal(values(net), before)


def test_parameters_without_gradient_are_skipped(method):
    """Oracle: the parameter before; it has no state either, and can join later."""
    net = model()
    name, skipped = next((n, p) for n, p in net.named_parameters() if p.ndim == 2)
    before, optimizer = values(net), method(parameter_groups(net, weight_decay=0.5))
    gradient(net, batches(1)[0], optimizer)
    skipped.grad = None
    optimizer.step()
    assert torch.equal(skipped, before[name]) and not optimizer.state.get(skipped)
    gradient(net, batches(1)[0], optimizer)
    optimizer.step()
    assert not torch.equal(skipped, before[name])


def test_gradients_are_only_read(method):
    net = model()
    optimizer = method(parameter_groups(net, weight_decay=0.1))
    gradient(net, batches(1)[0], optimizer)
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_groups_keep_their_own_settings(method):
    """Oracle: one optimizer for each group."""
    together, apart = model(), model()

    def split(net):
        groups = parameter_groups(net)
        for group, lr in zip(groups, (0.0, 1e-3, 1e-2, 3e-3), strict=True):
            group["lr"] = lr
        return groups

    first = method(split(together))
    others = [method([group]) for group in split(apart)]
    before = values(together)
    for batch in batches(3):
        gradient(together, batch, first)
        first.step()
        for optimizer in others:
            optimizer.zero_grad()
        next_token_loss(apart, batch).backward()
        for optimizer in others:
            optimizer.step()
    assert equal(values(together), values(apart))
    moved = {name: not torch.equal(value, before[name]) for name, value in values(together).items()}
    assert not moved["layers.0.attention.q_proj.weight"] and moved["embedding.weight"]  # negative control: 0 and 1e-3


def test_saved_and_loaded_goes_on_bit_for_bit(method):
    """Oracle: the run that was not interrupted. It goes on first, so that shared memory would show."""
    net = model()
    optimizer, todo = method(parameter_groups(net, weight_decay=0.1), lr=1e-2), batches(6)
    train(net, optimizer, todo[:3], 3)
    other = copy.deepcopy(net)
    state = optimizer.state_dict()
    again = method(parameter_groups(other))  # its settings come from the state
    again.load_state_dict(state)
    before = values(net)
    train(net, optimizer, todo[3:], 3)
    train(other, again, todo[3:], 3)
    assert equal(values(net), values(other)) and not equal(values(net), before)
    assert again.param_groups[0]["lr"] == 1e-2


def test_states_keep_the_dtype_they_were_saved_in(method):
    """Oracle: the state before; PyTorch's own method would cast it to bfloat16."""
    net = model(torch.bfloat16)
    optimizer = method(parameter_groups(net))
    train(net, optimizer, batches(1), 1)
    p = next(iter(optimizer.state))
    optimizer.state[p]["wide"] = [torch.ones(3), {"deep": torch.ones(2, dtype=torch.float64)}]
    again = method(parameter_groups(net))
    again.load_state_dict(optimizer.state_dict())
    wide = again.state[p]["wide"]
    assert wide[0].dtype == torch.float32 and wide[1]["deep"].dtype == torch.float64
    assert wide[0] is not optimizer.state[p]["wide"][0]


def test_a_closure_is_evaluated_once_and_its_loss_returned(method):
    """Oracle: gradients set before the step."""
    one, two, batch, calls = model(), model(), batches(1)[0], []
    first, second = method(parameter_groups(one)), method(parameter_groups(two))
    gradient(one, batch, first)
    assert first.step() is None

    def closure():
        calls.append(torch.is_grad_enabled())
        gradient(two, batch, second)
        return 7.0

    assert second.step(closure) == 7.0 and calls == [True]
    assert equal(values(one), values(two))


def test_sparse_gradients_are_refused_before_anything_moves(method):
    table, weight = nn.Embedding(5, 4, sparse=True), nn.Parameter(torch.ones(3, 3))
    optimizer = method([weight, table.weight])
    (table(torch.tensor([1])).sum() + weight.sum()).backward()
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="no sparse gradients"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_complex_parameters_are_refused(method, dtype):
    with pytest.raises(ValueError, match=r"real floating-point parameters, not torch\.complex64"):
        method([nn.Parameter(torch.ones(3, 3, dtype=dtype))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_the_step_in_float32_rounded(method, dtype):
    """Oracle: float32 weights, rounded by hand after each step; the states are the same and not rounded."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator).to(dtype)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    first, second = method([narrow], lr=1e-2), method([wide], lr=1e-2)
    for size in (1.0, 1e-3, 1e-6):
        g = (size * torch.randn(5, 7, generator=generator)).to(dtype)
        narrow.grad, wide.grad = g, g.float()
        first.step()
        second.step()
        with torch.no_grad():
            wide.copy_(wide.to(dtype))
    assert narrow.dtype == dtype and torch.equal(narrow.float(), wide)
    assert not torch.equal(narrow, start) and narrow.isfinite().all()
    assert state_bytes(first) == state_bytes(second)


def test_float64_stays_float64(method):
    """Oracle: float32, which agrees to its rounding and no further."""
    moved = []
    for dtype in (torch.float64, torch.float32):
        weight = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4))
        optimizer = method([weight], lr=1e-2)
        for step in range(3):
            weight.grad = torch.linspace(1, -2 + step, 12, dtype=dtype).view(3, 4)
            optimizer.step()
        assert weight.dtype == dtype
        moved.append(weight.detach().double())
    assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-6)  # the second is float32
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf")])
def test_a_bad_learning_rate_is_refused(method, lr):
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=f"lr={lr} must be"):
        method([weight], lr=lr)
    with pytest.raises(ValueError, match=f"lr={lr} must be"):
        method([{"params": [weight], "lr": lr}])


def test_an_empty_list_is_refused(method):
    with pytest.raises(ValueError, match="empty parameter list"):
        method([])


@pytest.mark.parametrize("shape", [(6, 4), (1, 5), (3, 1)])
def test_the_minimum_of_a_quadratic_is_found(method, shape):
    """Oracle: the known optimum; curvatures 1 to 10, the rate falling to zero."""
    generator = torch.Generator().manual_seed(0)
    goal, curvature = torch.randn(shape, generator=generator), 1 + 9 * torch.rand(shape, generator=generator)
    weight = nn.Parameter(goal + torch.randn(shape, generator=generator))
    start = float((weight - goal).detach().norm())
    optimizer = method([weight], lr=0.05)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        ((weight - goal) ** 2 * curvature).sum().backward()
        optimizer.step()
    assert float((weight - goal).detach().norm()) < 0.01 * start


def test_decay_alone_shrinks_towards_zero(method):
    """Oracle: closed form, each of five steps multiplies by 1 - lr * decay; the gradient is zero."""
    weight = nn.Parameter(torch.full((3, 4), 2.0, dtype=torch.float64))
    optimizer = method([{"params": [weight], "weight_decay": 0.5}], lr=0.1)
    for _ in range(5):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert_close(weight.detach(), torch.full((3, 4), 2 * (1 - 0.05) ** 5, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 100])
def test_the_size_of_chunks_changes_nothing(method, monkeypatch, size):
    """Oracle: everything in one chunk."""
    whole, cut = model(), model()
    monkeypatch.setattr(protocol, "CHUNK", {"cpu": 1 << 30, "other": 1 << 30})
    train(whole, method(parameter_groups(whole, 0.1)), batches(3), 3)
    monkeypatch.setattr(protocol, "CHUNK", {"cpu": size, "other": size})
    train(cut, method(parameter_groups(cut, 0.1)), batches(3), 3)
    assert equal(values(whole), values(cut))


def test_a_mixture_of_dtypes_equals_each_alone(method):
    """Oracle: an optimizer for each parameter."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(3, 4, generator=generator).to(dtype) for dtype in dtypes]
    gradients = [torch.randn(3, 4, generator=generator).to(dtype) for dtype in dtypes]

    def stepped(split):
        weights = [nn.Parameter(start.clone()) for start in starts]
        optimizers = [method(chosen, lr=1e-2) for chosen in ([[w] for w in weights] if split else [weights])]
        for factor in (1.0, -0.01, 0.3):
            for weight, g in zip(weights, gradients, strict=True):
                weight.grad = factor * g
            for optimizer in optimizers:
                optimizer.step()
        assert {
            v.dtype for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        } <= {torch.float32}  # states of half-precision parameters included
        return [w.detach() for w in weights]

    assert all(torch.equal(a, b) for a, b in zip(stepped(True), stepped(False), strict=True))


def test_it_trains_and_repeats(method):
    """Oracle: a text in which each token follows from the one before, so that the loss can go to zero."""

    def run():
        net = model()
        text = (torch.arange(8) + torch.arange(3)[:, None]) % 13
        return train(net, method(parameter_groups(net), lr=1e-2), [text] * 30, 30)

    losses = run()
    assert losses[-1] < losses[0] / 2 and losses == run()


def test_schedulers_of_pytorch_drive_it(method):
    """Oracle: the rate written out."""
    net = model()
    optimizer = method(parameter_groups(net), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            gradient(net, batch, optimizer)
            optimizer.step()
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 / 4] * len(optimizer.param_groups))


def test_bytes_freed_are_what_the_facet_says(entry, method):
    """Oracle: the facet `frees_memory`, and the state of PyTorch's AdamW."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(48, 64, generator=generator))
    weight.grad = torch.randn(48, 64, generator=generator)
    ours, theirs = method([weight]), torch.optim.AdamW([weight])
    ours.step()
    theirs.step()
    assert (state_bytes(ours) < 0.9 * state_bytes(theirs)) == entry.facets.frees_memory
