"""What holds for every sequence mixer; the list of methods is the taxonomy's, and softmax attention is among them."""

from dataclasses import asdict

import pytest
import torch
import yaml
from torch.testing import assert_close

import taxonomy
from refimpl.architecture.alternatives.protocol import Mixer, linear, state_bytes
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention

WIDTH = 16
METHODS = [m for m in taxonomy.load().find(category="architecture", implemented=True) if "mixers" in m.arena]


@pytest.fixture(params=[*METHODS, None], ids=lambda m: m.id if m else "softmax-attention")
def method(request):
    """The method at the settings of the arena's quick form."""
    if request.param is None:
        return SoftmaxAttention(head_dim=8)
    return request.param.load()(**{name: values[0] for name, values in request.param.arena["mixers"].items()})


def build(method, dtype=torch.float64, seed=0):
    return method.build(WIDTH, torch.Generator().manual_seed(seed)).to(dtype)


def draw(batch=2, time=33, dtype=torch.float64, seed=1):
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def steps(mixer, x, state=None):
    """All positions one by one, and the state after them."""
    state = mixer.initial_state(len(x)) if state is None else state
    outs = []
    for position in x.unbind(1):
        y, state = mixer.step(position, state)
        outs.append(y)
    return torch.stack(outs, dim=1), state


def flat(state):
    return [state] if isinstance(state, torch.Tensor) else [x for part in state for x in flat(part)]


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_equals_a_thousand_steps(method, dtype):
    """Oracle: the other form; inputs grow along the sequence, so that an error of the past would show."""
    mixer = build(method, dtype)
    x = draw(1, 1037, dtype) * torch.linspace(0.1, 3, 1037, dtype=dtype)[:, None]
    with torch.no_grad():
        whole, (stepped, _) = mixer(x), steps(mixer, x)
    assert whole.shape == x.shape and whole.std() > 1e-3
    # sums of 1,037 terms in another order
    assert_close(stepped, whole, **({} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.parametrize("cuts", [[1, 32], [16, 17], [5, 1, 20, 7], [3] * 11])
def test_chunks_equal_the_whole(method, cuts):
    """Oracle: the whole in one call; the state goes from chunk to chunk."""
    mixer, x = build(method), draw()
    state, outs = mixer.initial_state(2), []
    for part in x.split(cuts, dim=1):
        y, state = mixer.extend(part, state)
        outs.append(y)
    assert_close(torch.cat(outs, dim=1), mixer(x))
    assert_close(flat(state), flat(steps(mixer, x)[1]))


@pytest.mark.parametrize("split", [1, 16, 32])
def test_the_future_is_not_seen(method, split):
    """Oracle: other inputs from position `split` on change later outputs, and no earlier one."""
    mixer, x = build(method), draw()
    other = torch.cat((x[:, :split], draw(seed=2)[:, split:]), dim=1)
    assert_close(mixer(other)[:, :split], mixer(x)[:, :split])
    assert (mixer(other) - mixer(x))[:, split:].abs().max() > 1e-3  # negative control


def test_the_past_is_seen(method):
    """Oracle: another first input changes the outputs of all later positions; a layer without memory would pass the rest."""
    mixer, x = build(method), draw()
    other = torch.cat((x[:, :1] + 1, x[:, 1:]), dim=1)
    assert ((mixer(other) - mixer(x)).abs().amax(dim=(0, 2)) > 1e-12).all()


def test_a_batch_equals_its_rows(method):
    mixer, x = build(method), draw(3)
    assert_close(mixer(x), torch.cat([mixer(row[None]) for row in x]))
    assert_close(steps(mixer, x)[0], torch.cat([steps(mixer, row[None])[0] for row in x]))


def test_the_states_bytes(method):
    """Oracle: `constant_state`: the same after 3 and 96 positions, or growing in proportion."""
    mixer = build(method)
    _, short = steps(mixer, draw(time=3))
    _, long = mixer.extend(draw(time=93, seed=2), short)
    if mixer.constant_state:
        assert state_bytes(short) == state_bytes(long) == state_bytes(mixer.initial_state(2)) > 0
    else:
        assert state_bytes(long) > 10 * state_bytes(short) > 0


def test_the_state_holds_no_more_than_it_shows(method):
    """Oracle: the storage behind each tensor: a view would keep a whole sequence alive."""
    mixer = build(method)
    with torch.no_grad():
        for _, state in (mixer.extend(draw(), mixer.initial_state(2)), steps(mixer, draw())):
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in flat(state))


def test_states_and_inputs_are_not_written(method):
    """Oracle: copies; going back to a state and on from there gives the same again."""
    mixer, x = build(method), draw()
    _, state = mixer.extend(x, mixer.initial_state(2))
    before, copy = [part.clone() for part in flat(state)], x.clone()
    first = mixer.extend(x, state)[0], mixer.step(x[:, 0], state)[0]
    second = mixer.extend(x, state)[0], mixer.step(x[:, 0], state)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(flat(state), before, strict=True)) and torch.equal(x, copy)
    assert torch.equal(mixer(x), mixer(x))  # nothing is left in the layer


def test_gradients_reach_every_parameter_and_the_inputs(method):
    """Oracle: autograd through the steps."""
    mixer, x = build(method), draw().requires_grad_()
    weight = draw(seed=3)
    wanted = [*mixer.parameters(), x]
    ours = torch.autograd.grad((mixer(x) * weight).sum(), wanted)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in ours)
    assert_close(ours, torch.autograd.grad((steps(mixer, x)[0] * weight).sum(), wanted))


def test_gradients_reach_through_the_state(method):
    """Oracle: autograd of the whole; the first half trains on the second half's loss."""
    mixer, x = build(method), draw(time=12).requires_grad_()
    _, state = mixer.extend(x[:, :6], mixer.initial_state(2))
    halves = torch.autograd.grad(mixer.extend(x[:, 6:], state)[0].sum(), x)
    assert_close(halves, torch.autograd.grad(mixer(x)[:, 6:].sum(), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("time", [1, 2, 70])
def test_dtypes_and_short_inputs(method, dtype, time):
    """Oracle: float64 with the same, rounded weights and inputs."""
    mixer, x = build(method, dtype), draw(time=time, dtype=dtype)
    with torch.no_grad():
        out, (stepped, state) = mixer(x), steps(mixer, x)
        exact = mixer.double()(x.double())
    assert out.dtype == stepped.dtype == dtype and out.shape == x.shape
    assert all(torch.isfinite(part).all() for part in flat(state))
    near = 8 * torch.finfo(dtype).eps * exact.abs().max().item() if dtype == torch.bfloat16 else 1e-5
    assert_close(out.double(), exact, rtol=0, atol=near)  # bf16 rounds between the layer's products
    assert_close(stepped.double(), exact, rtol=0, atol=near)


def test_a_seed_fixes_the_weights(method):
    one, same, other = (build(method, seed=seed) for seed in (0, 0, 1))
    assert isinstance(one, Mixer) and one.d_model == WIDTH
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 0, WIDTH), (2, 3, WIDTH + 1)])
def test_shapes_that_do_not_fit_are_refused(method, shape):
    mixer = build(method)
    with pytest.raises(ValueError, match="must be"):
        mixer(torch.ones(shape, dtype=torch.float64))


def test_linear_layers_are_drawn_as_pytorch_draws_them(generator):
    """Oracle: bound and variance of a uniform distribution in +-1/sqrt(inputs), as nn.Linear's default."""
    layer = linear(64, 1000, generator, bias=True)
    assert layer.weight.abs().max() <= 1 / 8 and layer.bias.abs().max() <= 1 / 8
    assert layer.weight.var().item() == pytest.approx((1 / 8) ** 2 / 3, rel=0.02)
    assert layer.weight.var().item() == pytest.approx(torch.nn.Linear(64, 1000).weight.var().item(), rel=0.03)
    assert layer.weight.requires_grad and not layer.weight.is_meta
