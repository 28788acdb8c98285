"""Mixed precision in float16: PyTorch's scaler step for step, exactness of the scaling, and what each part is for."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import FullPrecision, next_token_loss, train, windows
from refimpl.pretraining.mixed_precision.amp_fp16 import AmpFP16

ONE = torch.ones(1, 1)


def planted(value):
    """A loss whose gradient on `nn.Linear(1, 1)` is `value` and the input 1, or not finite."""
    return lambda model, batch: model(batch).float().sum() * value


def single(start=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    return model


def steps(model, session, optimizer, values):
    """Weights, scales and whether a step was taken, after each planted gradient."""
    found = []
    for value in values:
        optimizer.zero_grad()
        session.backward(model, planted(value), ONE)
        found.append((session.update(optimizer), session.scale, model.weight.item()))
    return found


def test_worked_by_hand():
    """Oracle: by hand, scale 8, growth after 2 clean steps, SGD with rate 1 on a weight of 4."""
    model = single(4.0)
    session = AmpFP16(init_scale=8.0, growth_interval=2).start(model)
    found = steps(
        model, session, torch.optim.SGD(model.parameters(), lr=1.0), [0.5, math.inf, 0.25, 1.0, math.nan, 0.5]
    )
    assert found == [
        (True, 8.0, 3.5), (False, 4.0, 3.5), (True, 4.0, 3.25), (True, 8.0, 2.25), (False, 4.0, 2.25), (True, 4.0, 1.75),
    ]  # fmt: skip


def test_equals_pytorchs_scaler_step_for_step(generator):
    """Oracle: torch.amp.GradScaler (2.13) on the CPU: scales, skipped steps and weights, with overflows planted at random."""
    values = torch.randn(60, generator=generator).tolist()
    for i in torch.randperm(60, generator=generator)[:12].tolist():
        values[i] = math.inf if i % 2 else math.nan
    settings = {"init_scale": 2.0**10, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
    model, peer = single(), single()
    session = AmpFP16(**settings).start(model)
    ours = steps(model, session, torch.optim.Adam(model.parameters(), lr=0.01), values)
    scaler, optimizer, theirs = (
        torch.amp.GradScaler("cpu", **settings),
        torch.optim.Adam(peer.parameters(), lr=0.01),
        [],
    )
    for value in values:
        optimizer.zero_grad()
        before = peer.weight.item()
        narrow = peer.weight.detach().half().requires_grad_()
        scaler.scale(planted(value)(lambda x, w=narrow: x.half() @ w.T, ONE)).backward()
        peer.weight.grad = narrow.grad.float()
        scaler.step(optimizer)
        scaler.update()
        theirs.append((peer.weight.item() != before, scaler.get_scale(), peer.weight.item()))
    assert ours == theirs
    assert len({scale for _, scale, _ in ours}) > 3 and sum(not taken for taken, _, _ in ours) >= 12


def test_beside_pytorch(peer, generator):
    """Oracle: torch.amp (2.13), autocast and GradScaler, on a small decoder; each call is one more step on the same batch."""
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 128}
    model = initialize_(Decoder(Config(vocabulary=256, **sizes)), generator, std=0.1)
    batch, theirs = torch.randint(256, (2, 65), generator=generator), copy.deepcopy(model)
    session, scaler = AmpFP16().start(model), torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, theirs)]

    def ours():
        optimizers[0].zero_grad()
        session.backward(model, next_token_loss, batch)
        assert session.update(optimizers[0])
        return [p.detach() for p in model.parameters()]

    def autocast():
        optimizers[1].zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = next_token_loss(theirs, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizers[1])
        scaler.update()
        return [p.detach() for p in theirs.parameters()]

    peer(
        "amp-fp16",
        "torch",
        "a step of a decoder of two layers of width 64, 128 tokens",
        ours,
        autocast,
        within=1e-4,  # float16 rounding: autocast leaves norms, sums and rotations in float32; steps are up to 0.01
    )


def test_a_skipped_step_leaves_the_optimizers_state(generator):
    """Oracle: the state before."""
    model = single()
    optimizer, session = torch.optim.Adam(model.parameters()), AmpFP16().start(model)
    steps(model, session, optimizer, [1.0])
    before = {name: value.clone() for name, value in optimizer.state[model.weight].items()}
    steps(model, session, optimizer, [math.inf])
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[model.weight].items())


def test_an_overflow_in_any_batch_of_a_step_skips_it():
    """Oracle: by hand; the flag is for one step only."""
    model = single(2.0)
    session, optimizer = AmpFP16().start(model), torch.optim.SGD(model.parameters(), lr=1.0)
    for value in (math.inf, 1.0):
        session.backward(model, planted(value), ONE)
    assert not session.update(optimizer)
    assert steps(model, session, optimizer, [1.0])[0] == (True, 2.0**15, 1.0)


@pytest.mark.parametrize("exponent", [-8, 0, 5, 10])
def test_scaling_by_a_power_of_two_is_exact(exponent, generator):
    """Oracle: arithmetic. Without under- or overflow it changes exponents only: float16 gradients, unscaled, bit for bit."""
    weight, x = torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator)
    model = nn.Linear(5, 4, bias=False)
    model.weight.data.copy_(weight)

    def loss(model, batch):
        return model(batch).float().square().sum()

    AmpFP16(init_scale=2.0**exponent).start(model).backward(model, loss, x)
    narrow = weight.half().requires_grad_()
    (x.half() @ narrow.T).float().square().sum().backward()
    assert torch.equal(model.weight.grad, narrow.grad.float())
    model.zero_grad()
    FullPrecision().backward(model, loss, x)
    assert not torch.equal(model.weight.grad, narrow.grad.float())  # negative control: float32 is something else
    assert_close(
        model.weight.grad, narrow.grad.float(), rtol=0.02, atol=0.02
    )  # float16 rounds by 2**-11 at each of 4 places


@pytest.mark.parametrize(
    ("value", "scale", "survives"), [(2.0**-24, 1, True), (2.0**-26, 1, False), (2.0**-26, 4, True)]
)
def test_gradients_below_the_smallest_number_need_the_scale(value, scale, survives):
    """Oracle: the format: 2**-24 is its smallest number, a quarter of it rounds to zero."""
    model = single()
    AmpFP16(init_scale=scale).start(model).backward(model, planted(value), ONE)
    assert model.weight.grad.item() == (value if survives else 0.0)


def test_master_weights_add_up_what_float16_would_lose():
    """Oracle: by hand. 4,096 updates of 2**-13 move 1 to 1.5; in float16 1 + 2**-13 is 1."""
    model, narrow = single(), torch.ones((), dtype=torch.float16)
    session, optimizer = AmpFP16(init_scale=1.0).start(model), torch.optim.SGD(model.parameters(), lr=2.0**-13)
    for _ in range(16):
        model.weight.grad = torch.full((1, 1), -256.0)
        session.update(optimizer)
    for _ in range(4096):
        narrow += 2.0**-13
    assert model.weight.item() == 1.5 and narrow.item() == 1.0


def test_reductions_accumulate_in_float32():
    """Oracle: by hand. 2048 + 1 is 2048 in float16, so that a sum kept there would stop at 2048."""
    ones = torch.ones(1, 4096, dtype=torch.float16)
    ones[0, 0] = 2048
    assert (ones @ torch.ones(4096, 1, dtype=torch.float16)).item() == 6144  # 6143, rounded
    spread = torch.softmax(torch.zeros(8192, dtype=torch.float16), dim=0)
    assert spread.unique().tolist() == [2.0**-13]
    wide = nn.functional.layer_norm(ones, (4096,)).float()
    assert_close(wide, nn.functional.layer_norm(ones.float(), (4096,)), rtol=2e-3, atol=1e-3)  # rounding of the output


def test_a_constant_scale_stays(generator):
    """Oracle: the paper's own choice, factors of 1."""
    model = single()
    session = AmpFP16(init_scale=8.0, growth_factor=1.0, backoff_factor=1.0, growth_interval=1).start(model)
    found = steps(model, session, torch.optim.SGD(model.parameters(), lr=0.1), [1.0, math.inf, 1.0])
    assert [(taken, scale) for taken, scale, _ in found] == [(True, 8.0), (False, 8.0), (True, 8.0)]


def test_the_scale_stops_at_the_largest_float32():
    """Oracle: torch.amp.GradScaler, which does not grow past it."""
    model = single()
    session = AmpFP16(init_scale=2.0**127, growth_interval=1).start(model)
    assert steps(model, session, torch.optim.SGD(model.parameters(), lr=0.1), [0.0]) == [(True, 2.0**127, 1.0)]


def test_a_training_that_cannot_go_on_says_so():
    model = single()
    session, optimizer = AmpFP16(init_scale=2.0**-22).start(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="not finite at any scale"):
        steps(model, session, optimizer, [math.nan] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_scale": 0.0}, "init_scale=0.0 must be finite and at least"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"growth_factor": 0.5}, "growth_factor=0.5 must be finite and at least 1"),
        ({"backoff_factor": 0.0}, r"backoff_factor=0.0 must be in \(0, 1\]"),
        ({"backoff_factor": 2.0}, r"backoff_factor=2.0 must be in \(0, 1\]"),
        ({"growth_interval": 0}, "growth_interval=0 must be at least 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        AmpFP16(**change)


# Claims


@pytest.fixture(scope="module")
def trained():
    """A decoder after 60 steps on a text of 256 words, each followed by one of four; and a batch of 1,024 tokens."""
    generator = torch.Generator().manual_seed(0)
    follow, choice = torch.randint(256, (256, 4), generator=generator), torch.randint(4, (8000,), generator=generator)
    words = [0]
    for c in choice.tolist():
        words.append(int(follow[words[-1], c]))
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 64}
    model = initialize_(Decoder(Config(vocabulary=256, **sizes)), generator)
    batches = windows(torch.tensor(words), 16, 64, generator)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches, 60)
    return model, next(batches)


def activation_gradients(model, session, batch):
    """Gradients of the outputs of all linear layers, as they stand in memory."""
    found = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [m.register_full_backward_hook(lambda m, g_in, g_out: found.append(g_out[0].flatten())) for m in layers]
    session.backward(model, next_token_loss, batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


@pytest.fixture(scope="module")
def lost(trained):
    """Share of activation gradients that are zero in float16 and not in float32, by scale."""
    model, batch = trained
    there = activation_gradients(model, FullPrecision(), batch) != 0

    def share(scale):
        gradients = activation_gradients(model, AmpFP16(init_scale=scale).start(model), batch)
        assert gradients.dtype == torch.float16 and gradients.isfinite().all()
        return float(((gradients == 0) & there).sum() / there.sum())

    return share


def test_claim_vanishing_gradients(claim, lost):
    """Share of the activation gradients of a small decoder that vanish where the loss is not scaled."""
    claim("amp-fp16", "vanishing-gradients", lost(1.0))


def test_claim_scaling_keeps_them(claim, lost):
    """How much of that share is left at a scale of 2**16."""
    claim("amp-fp16", "scaling-keeps-them", lost(2.0**16) / lost(1.0))


def test_claim_vanishing_updates(claim):
    """Smallest ratio of weight to update at which float16 weights do not move, over all fractions of a weight."""
    weights = (1 + torch.arange(1024) / 1024).half()
    smallest = math.inf
    for exponent in range(8, 16):
        update = torch.tensor(2.0**-exponent).half()
        for sign in (1, -1):
            still = (weights + sign * update) == weights
            if still.any():
                smallest = min(smallest, float(weights[still].min() / update))
    claim("amp-fp16", "vanishing-updates", smallest)


def test_claim_weight_memory(claim, trained):
    """Bytes of float16 copies and float32 masters over those of float32 weights alone."""
    model, _ = trained
    alone = sum(p.nbytes for p in model.parameters())
    claim("amp-fp16", "weight-memory", (AmpFP16().start(model).nbytes + alone) / alone)


def test_claim_activation_memory(claim, generator):
    """Bytes kept for the backward pass over those in float32, weights apart; a decoder of four layers, 64 words."""
    sizes = {"d_model": 48, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "d_ff": 128}
    model = initialize_(Decoder(Config(vocabulary=64, **sizes)), generator)
    batch = torch.randint(64, (4, 65), generator=generator)

    def kept(session):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            session.backward(model, next_token_loss, batch)
        weights = {
            p.untyped_storage().data_ptr() for p in [*model.parameters(), *getattr(session, "copies", {}).values()]
        }
        return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)

    claim("amp-fp16", "activation-memory", kept(AmpFP16().start(model)) / kept(FullPrecision()))
