"""What holds for every mixture of experts; the list of methods is the taxonomy's."""

from dataclasses import asdict

import pytest
import torch
import yaml
from torch.testing import assert_close

import taxonomy
from refimpl.architecture.moe.protocol import MoE

WIDTH, INNER = 8, 12
METHODS = [m for m in taxonomy.load().find(category="architecture/moe", implemented=True) if "moe" in m.arena]


@pytest.fixture(params=METHODS, ids=lambda m: m.id)
def method(request):
    """The method at the settings of the arena's quick form."""
    return request.param.load()(**{name: values[0] for name, values in request.param.arena["moe"].items()})


def build(method, seed=0):
    """A layer in float64 that has forgotten its small initial weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    layer = method.build(WIDTH, INNER, generator).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def draw(*shape, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_routing(layer, x, routing):
    """Oracle: the sum that the routing states, token by token and choice by choice."""
    flat = [part.reshape(-1, routing.expert.shape[-1]).tolist() for part in routing[:3]]
    rows = []
    for token, experts, gates, served in zip(x.reshape(-1, WIDTH), *flat, strict=True):
        row = torch.zeros(WIDTH, dtype=x.dtype)
        for e, gate, taken in zip(experts, gates, served, strict=True):
            if taken:
                row = row + gate * layer.experts.one(token[None], e)[0]
        rows.append(row)
    return torch.stack(rows).view(x.shape)


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("shape", [(1,), (33,), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_the_output_is_what_the_routing_says(method, shape, training):
    """Oracle: brute force over tokens and choices."""
    layer, x = build(method).train(training), draw(*shape)
    y, auxiliary, routing = layer(x, torch.Generator().manual_seed(0))
    assert isinstance(layer, MoE) and y.shape == x.shape and auxiliary.ndim == 0 and torch.isfinite(auxiliary)
    assert routing.expert.shape[:-1] == routing.gate.shape[:-1] == routing.served.shape[:-1] == shape
    assert_close(y, by_routing(layer, x, routing))
    assert y.abs().max() > 0.01  # negative control


def test_loads_count_what_is_served(method):
    """Oracle: a count, token by token; what is not chosen is not served."""
    layer = build(method).train()
    _, _, routing = layer(draw(3, 50))
    counted = [0] * layer.experts.n_experts
    for e, taken in zip(routing.expert.flatten().tolist(), routing.served.flatten().tolist(), strict=True):
        counted[e] += taken
    assert routing.load.tolist() == counted and sum(counted) == routing.served.sum()
    assert not (routing.served & (routing.gate == 0)).any()
    assert (routing.demand >= routing.load).all()


def test_a_dropped_token_comes_out_as_zero(method):
    """Oracle: the residual alone; tokens that are all alike want the same expert, and fill it where there is a capacity."""
    layer, x = build(method).train(), draw(1).expand(200, WIDTH)
    y, _, routing = layer(x)
    assert (y[routing.dropped] == 0).all() and (y[~routing.dropped] != 0).any(dim=-1).all()


def test_a_permutation_of_tokens_permutes_the_outputs(method):
    """Oracle: the outputs, permuted; where nothing is dropped in either order."""
    layer, x = build(method), draw(24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    y, auxiliary, routing = layer(x)
    moved, auxiliary_moved, routing_moved = layer(x[order])
    if routing.dropped.any() or routing_moved.dropped.any():
        pytest.skip("tokens are dropped, which depends on their order")
    assert_close(moved, y[order])
    assert_close(auxiliary_moved, auxiliary)


def test_gradients_reach_the_router_and_the_experts_that_were_used(method):
    """Oracle: `Routing.load`: an expert without tokens has no gradient; and the sum that the routing states."""
    layer, x = build(method), draw(6).requires_grad_()
    y, auxiliary, routing = layer(x)
    weight = draw(6, seed=2)
    wanted = list(layer.experts.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    assert_close(ours, torch.autograd.grad((by_routing(layer, x, routing) * weight).sum(), wanted))
    for gradient in ours:
        used = gradient.flatten(1).abs().amax(dim=1) > 0
        assert torch.equal(used, routing.load > 0)
    router = [p for name, p in layer.named_parameters() if not name.startswith("experts.")]
    assert router
    gradients = torch.autograd.grad((y * weight).sum() + auxiliary, [*router, x])
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_one_expert_is_the_dense_feed_forward(method):
    """Oracle: the expert itself, times its gate."""
    layer, x = build(type(method)(**asdict(method) | {"n_experts": 1})), draw(5)
    y, _, routing = layer(x)
    assert routing.served.all()
    assert_close(y, layer.experts.one(x, 0) * routing.gate.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(method, dtype):
    """Oracle: float64 with the same, rounded inputs and weights, where both route alike."""
    layer, x = build(method).to(dtype), draw(40).to(dtype)
    y, auxiliary, routing = layer(x)
    exact, _, other = layer.double()(x.double())
    wide = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype and routing.gate.dtype == wide and auxiliary.dtype == wide
    same = (routing.expert == other.expert).all(-1) & (routing.served == other.served).all(-1)
    assert same.float().mean() > 0.9
    error = (y.double() - exact)[same].norm() / exact[same].norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_inputs_are_not_written_and_the_next_call_is_the_same(method):
    layer, x = build(method), draw(20)
    before = x.clone()
    first = layer(x)[0]
    layer(draw(50, seed=3))
    assert torch.equal(layer(x)[0], first) and torch.equal(x, before)


def test_a_seed_fixes_weights_and_noise(method):
    def outputs(weights, noise):
        layer = method.build(WIDTH, INNER, torch.Generator().manual_seed(weights)).train()
        return layer(draw(40).float(), torch.Generator().manual_seed(noise))[0]

    assert torch.equal(outputs(0, 0), outputs(0, 0))
    assert not torch.equal(outputs(0, 0), outputs(1, 0))


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


@pytest.mark.parametrize("shape", [(3, WIDTH + 1), (0, WIDTH), ()])
def test_inputs_that_do_not_fit_are_refused(method, shape):
    with pytest.raises(ValueError, match="must be"):
        build(method)(torch.zeros(shape, dtype=torch.float64))
