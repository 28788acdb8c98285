"""Switch Transformer: a loop over tokens, numbers by hand, transformers' router and loss, and what the paper claims."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from refimpl.architecture.moe.models.switch import Switch, capacity, groups, load_balancing_loss, places
from refimpl.model.config import Config
from refimpl.model.model import SwiGLU


def wild(layer, generator, scale=1.0):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return layer


def token_by_token(layer, x, n_places, size):
    """The paper's layer as a loop: probabilities, the likeliest expert, a place while there is one, Eqs. (1) to (6)."""
    n = layer.config.n_experts
    y, losses = torch.zeros_like(x), []
    for start in range(0, len(x), size):
        taken, chosen, summed = [0] * n, [0] * n, torch.zeros(n, dtype=x.dtype)
        for t in range(start, start + size):
            p = (layer.router @ x[t]).exp()
            p = p / p.sum()
            i = int(p.argmax())
            chosen[i] += 1
            summed = summed + p
            if taken[i] < n_places:
                taken[i] += 1
                up, gate = layer.experts.up_proj[i] @ x[t], layer.experts.gate_proj[i] @ x[t]
                y[t] = p[i] * (layer.experts.down_proj[i] @ (gate * gate.sigmoid() * up))
        losses.append(n * sum(c / size * q / size for c, q in zip(chosen, summed.tolist(), strict=True)))
    return y, layer.config.alpha * sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("tokens", "group_size", "factor", "n_places", "size"),
    [(40, 1024, 1.0, 10, 40), (40, 20, 1.0, 5, 20), (41, 20, 1.9, 19, 41), (60, 15, 0.1, 4, 15), (64, 64, 2.0, 32, 64)],
)
def test_equals_a_loop_over_tokens(tokens, group_size, factor, n_places, size, generator):
    """Oracle: brute force in float64; places and group sizes by hand."""
    config = Switch(n_experts=4, eval_capacity_factor=factor, group_size=group_size)
    layer = wild(config.build(6, 9, generator).double().eval(), generator)
    x = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    x[:, 0] += 1.5  # uneven loads
    with torch.no_grad():
        layer.router[1, 0] += 1
        y, auxiliary, routing = layer(x)
        expected, loss = token_by_token(layer, x, n_places, size)
    assert_close(y, expected)
    assert auxiliary.item() == pytest.approx(loss, rel=1e-12)
    assert torch.equal(routing.dropped, (expected == 0).all(dim=-1))
    if factor <= 1:
        assert 0 < routing.dropped.float().mean() < 0.9  # negative control: the capacity cuts


def test_worked_by_hand():
    """Oracle: by hand. Two experts, probabilities (3/4, 1/4) three times and (1/5, 4/5) once:
    f = (3/4, 1/4), P = (49/80, 31/80), loss = 2 (147 + 31) / 320."""
    p = torch.tensor([[[0.75, 0.25]] * 3 + [[0.2, 0.8]]])
    expert = torch.tensor([[0, 0, 0, 1]])
    assert load_balancing_loss(p, expert).item() == pytest.approx(2 * (147 + 31) / 320)
    assert places(expert, 2).tolist() == [[0, 1, 2, 0]]
    two = load_balancing_loss(torch.cat((p, 1 - p)), torch.cat((expert, 1 - expert)))  # a mirrored group, the same loss
    assert two.item() == pytest.approx(2 * (147 + 31) / 320)


def test_capacity_by_hand():
    """Oracle: by hand, from the official code: int(S * factor / N), at most S, at least 4."""
    assert [capacity(1024, 16, f) for f in (1.0, 1.25, 2.0)] == [64, 80, 128]
    assert capacity(100, 16, 1.25) == 7  # 7.8, rounded down
    assert capacity(100, 1, 1.25) == 100 and capacity(2, 16, 1.0) == 4
    assert [groups(n, 1024) for n in (1, 1024, 1025, 2048, 3 * 1024 + 3, 2053)] == [1, 1, 1, 2, 3, 1]  # 2053 is prime


def test_tokens_are_dropped_in_order(generator):
    """Oracle: by hand. 20 equal tokens, 2 experts, factor 1: ten places, so the first ten are served."""
    layer = wild(Switch(n_experts=2, eval_capacity_factor=1.0).build(6, 9, generator).eval(), generator)
    y, _, routing = layer(torch.ones(20, 6))
    assert routing.dropped.tolist() == [False] * 10 + [True] * 10
    assert (y[10:] == 0).all() and (y[:10] != 0).all()
    assert_close(y[:10], y[:1].expand(10, 6))
    assert routing.load.sort().values.tolist() == [0, 10] and routing.demand.sort().values.tolist() == [0, 20]


@pytest.mark.parametrize("training", [False, True])
def test_capacity_in_training_and_after(training, generator):
    """Oracle: by hand. 16 equal tokens and 2 experts: factor 1.25 gives 10 places, factor 2 gives 16."""
    layer = wild(Switch(n_experts=2).build(6, 9, generator), generator).train(training)
    assert layer(torch.ones(16, 6))[2].load.max() == (10 if training else 16)


def test_the_gate_trains_the_router(generator):
    """Oracle: the derivative of p_i(x) E_i(x), by finite differences."""
    layer = wild(Switch(n_experts=3, alpha=0.0).build(4, 5, generator).double().eval(), generator)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)

    def output(router):
        with torch.no_grad():
            layer.router.copy_(router)
        return torch.func.functional_call(layer, {"router": router}, (x,))[0]

    router = layer.router.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(output(router).sum(), router)[0]
    assert gradient.abs().min() > 0  # one expert a token, and yet every row learns
    assert torch.autograd.gradcheck(lambda r: torch.func.functional_call(layer, {"router": r}, (x,))[0], router)


def test_only_probabilities_have_a_gradient_in_the_loss():
    """Oracle: by hand. d loss / d p = N f / tokens."""
    p = torch.tensor([[[0.75, 0.25], [0.6, 0.4]]], requires_grad=True)
    gradient = torch.autograd.grad(load_balancing_loss(p, torch.tensor([[0, 1]])), p)[0]
    assert_close(gradient, torch.full((1, 2, 2), 2 * 0.5 / 2))


def test_one_expert_is_the_dense_feed_forward(generator):
    """Oracle: the substrate's SwiGLU; with one expert the gate is 1, and nothing is dropped."""
    layer = wild(Switch(n_experts=1).build(6, 9, generator), generator).train()
    dense = SwiGLU(Config(vocabulary=5, d_model=6, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=6, d_ff=9))
    dense.load_state_dict({f"{name}.weight": value[0] for name, value in layer.experts.named_parameters()})
    x = torch.randn(33, 6, generator=generator)
    y, auxiliary, routing = layer(x)
    assert_close(y, dense(x))
    assert (routing.gate == 1).all() and auxiliary.item() == pytest.approx(0.01)


def test_jitter(generator):
    """Oracle: bounds and mean of the uniform factor, seen through a router that reads one input."""
    layer = Switch(n_experts=2, jitter=0.1).build(1, 2, generator).train()
    with torch.no_grad():
        layer.router.copy_(torch.tensor([[1.0], [0.0]]))
    _, gate, _, _ = layer.route(torch.ones(20_000, 1), generator)
    factor = (gate / (1 - gate)).log()  # the logit, which is the jittered input
    assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1001
    assert factor.mean().item() == pytest.approx(1, abs=0.002)
    assert (layer.eval().route(torch.ones(9, 1), generator)[1].logit() - 1).abs().max() < 1e-5  # training only


def test_the_router_computes_in_float32(generator):
    """Oracle: selective precision (Section 2.4): bf16 inputs and weights, probabilities as float32 gives them."""
    layer = wild(Switch(n_experts=4).build(64, 9, generator), generator).bfloat16().eval()
    x = torch.randn(50, 64, generator=generator).bfloat16()
    exact = F.linear(x.float(), layer.router.float()).softmax(-1).amax(-1)
    gate = layer(x)[2].gate[:, 0]
    assert gate.dtype == torch.float32
    assert_close(gate, exact)
    coarse = F.linear(x, layer.router).softmax(-1).amax(-1).float()
    assert (coarse - exact).abs().max() > 1e-3  # negative control


def test_equals_transformers(generator):
    """Oracle: transformers' SwitchTransformersSparseMLP and load_balancing_loss_func (5.23). It counts places row by row,
    as groups of a row's length do here."""
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

    config = Switch(n_experts=4, eval_capacity_factor=1.0, group_size=20)
    layer = wild(config.build(6, 9, generator, activation="relu").eval(), generator)
    peer, x = of_transformers(layer, expert_capacity=5), torch.randn(3, 20, 6, generator=generator)
    with torch.no_grad():
        y, auxiliary, routing = layer(x)
        assert_close(y, peer(x), rtol=1e-5, atol=1e-5)  # outputs of size 10
        logits = peer.router(x)[2]
    assert 0 < routing.dropped.float().mean() < 0.5
    theirs = load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    assert auxiliary.item() == pytest.approx(0.01 * theirs.item(), rel=1e-5)


def of_transformers(layer, expert_capacity):
    """SwitchTransformersSparseMLP with the weights of a layer."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    experts, d_ff, d_model = layer.experts.up_proj.shape
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_experts": experts, "expert_capacity": expert_capacity}
    mlp = SwitchTransformersSparseMLP(SwitchTransformersConfig(**sizes, dropout_rate=0.0)).eval()
    with torch.no_grad():
        mlp.router.classifier.weight.copy_(layer.router)
        for i in range(experts):
            mlp.experts[f"expert_{i}"].wi.weight.copy_(layer.experts.up_proj[i])
            mlp.experts[f"expert_{i}"].wo.weight.copy_(layer.experts.down_proj[i])
    return mlp


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Oracle: transformers' SwitchTransformersSparseMLP (5.23), with a place for every token."""
    config = Switch(n_experts=8, eval_capacity_factor=8.0, group_size=256)
    ours = config.build(256, 512, generator, activation="relu").eval()
    theirs = of_transformers(ours, expert_capacity=256)
    x = torch.randn(4, 256, 256, generator=generator)

    def call(layer, router):
        layer.zero_grad()
        with torch.set_grad_enabled(what != "forward"):
            y = layer(x)[0] if layer is ours else layer(x)
        if what == "forward":
            return y
        y.square().sum().backward()
        return y.detach(), router.grad

    peer(
        "switch",
        "transformers",
        f"{what} of 8 experts, 256 to 512 wide, 1,024 tokens; ours computes the loss of balance too",
        lambda: call(ours, ours.router),
        lambda: call(theirs, theirs.router.classifier.weight),
        within=1e-5,  # float32 rounding of sums over 512
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_experts": 0}, "n_experts=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
        ({"eval_capacity_factor": float("nan")}, "eval_capacity_factor=nan"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"jitter": 1.0}, "jitter=1.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Switch(**settings)


def test_claim_constant_compute(claim, generator):
    """Operations of a layer of 64 experts over those of 8, for 4,096 tokens; parameters by hand."""
    x, operations = torch.randn(4096, 32, generator=generator), {}
    for n in (8, 64):
        layer = Switch(n_experts=n).build(32, 128, generator).train()
        assert sum(p.numel() for p in layer.parameters()) == n * (3 * 32 * 128 + 32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        operations[n] = counter.get_total_flops()
    dense = 4096 * 2 * 3 * 32 * 128
    assert 0.9 * dense < operations[8] < 1.4 * dense  # negative control: no expert is left out, none runs on all
    claim("switch", "constant-compute", operations[64] / operations[8])


def test_claim_even_loss(claim):
    """Auxiliary loss of an even routing, with 2, 8 and 64 experts; all tokens on one expert, for certain, give N times as much."""
    losses = []
    for n in (2, 8, 64):
        even, expert = torch.full((1, 2 * n, n), 1 / n), torch.arange(2 * n).view(1, -1) % n
        one = torch.zeros(1, 2 * n, dtype=torch.long)
        assert load_balancing_loss(F.one_hot(one, n).float(), one).item() == pytest.approx(n)
        losses.append(0.01 * load_balancing_loss(even, expert).item())
    claim("switch", "even-loss", max(losses, key=lambda loss: abs(loss - 0.01)))


def test_claim_even_is_least(claim):
    """Loss of an uneven routing over an even one's. By hand: f = (0.6, 0.4), P = (0.306, 0.694), 2 f P = 0.9224."""
    p = torch.tensor([[[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4])
    value = load_balancing_loss(p, p.argmax(dim=-1)).item()
    assert value == pytest.approx(0.9224)
    claim("switch", "even-is-least", value)


def trained(alpha, steps=100):
    """A layer of eight experts, trained to copy a random network on tokens of uneven clusters; its demand and drops then."""
    generator = torch.Generator().manual_seed(0)
    centres, truth = 2 * torch.randn(8, 16, generator=generator), torch.randn(16, 16, generator=generator)
    layer = Switch(n_experts=8, alpha=alpha).build(16, 16, generator).train()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)

    def draw(n):
        return centres[torch.randint(0, 8, (n,), generator=generator)] + torch.randn(n, 16, generator=generator)

    for _ in range(steps):
        x = draw(256)
        y, auxiliary, _ = layer(x, generator)
        loss = (y - torch.tanh(x @ truth)).square().mean() + auxiliary
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    routing = layer(draw(4096), generator)[2]
    return routing.demand.max().item() / 4096, routing.dropped.float().mean().item()


def test_claim_balance_and_drops(claim):
    """Tokens of the fullest expert with the loss over those without; share that is dropped at ten times its factor."""
    (alone, lost_alone), (fullest, lost), (_, few) = trained(0.0), trained(0.01), trained(0.1)
    assert lost_alone > 2 * lost > 10 * few  # control: with little loss or none, experts overflow
    claim("switch", "balances", fullest / alone)
    claim("switch", "few-dropped", few)
