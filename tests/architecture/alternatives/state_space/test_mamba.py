"""Mamba: Algorithm 2 written out, transformers' layer and checkpoints, the gate of Theorem 1, and what the paper claims."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig, States
from refimpl.architecture.alternatives.protocol import state_bytes
from refimpl.architecture.alternatives.scan import linear_scan
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
from refimpl.architecture.alternatives.state_space.mamba import Mamba, MambaMixer, State, load
from refimpl.architecture.alternatives.state_space.selective_scan import selective_scan

TOKENS = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(1))


def wild(mixer, generator):
    """Large weights, so that steps, decays and gates differ much from place to place."""
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name not in ("A_log", "dt_proj.bias"):
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return mixer


def written_out(mixer, x):
    """The layer as Algorithm 2 and Figure 3 have it, one row, one position, one channel at a time, with loops."""
    p, n = dict(mixer.named_parameters()), mixer.config.d_state
    rank, channels = p["dt_proj.weight"].shape[1], len(p["D"])
    out = torch.zeros_like(x)
    for row in range(len(x)):
        u_z = x[row] @ p["in_proj.weight"].T
        u, z = u_z[:, :channels], u_z[:, channels:]
        h = torch.zeros(channels, n, dtype=x.dtype)
        for t in range(x.shape[1]):
            c = p["conv1d.bias"].clone()
            for back in range(mixer.config.d_conv):
                if t - back >= 0:
                    c = c + p["conv1d.weight"][:, 0, mixer.config.d_conv - 1 - back] * u[t - back]
            c = c * torch.sigmoid(c)
            low, B, C = (p["x_proj.weight"] @ c).split((rank, n, n))
            delta = torch.log1p((p["dt_proj.weight"] @ low + p["dt_proj.bias"]).exp())
            y = torch.zeros(channels, dtype=x.dtype)
            for d in range(channels):
                h[d] = (delta[d] * -p["A_log"][d].exp()).exp() * h[d] + delta[d] * B * c[d]
                y[d] = C @ h[d] + p["D"][d] * c[d]
            out[row, t] = p["out_proj.weight"] @ (y * z[t] * torch.sigmoid(z[t]))
    return out


@pytest.mark.parametrize("settings", [{}, {"d_state": 3, "d_conv": 2, "expand": 1, "dt_rank": 3}, {"d_conv": 1}])
def test_equals_algorithm_2_written_out(settings, generator):
    """Oracle: the paper's algorithm as loops over positions and channels, in float64."""
    mixer = wild(Mamba(**settings).build(6, generator).double(), generator)
    x = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = mixer(x), written_out(mixer, x)
        assert_close(ours, theirs)
        mixer.D.zero_()
        assert (mixer(x) - ours).abs().max() > 0.01  # negative control: the skip counts


def test_the_gate_of_theorem_1(generator):
    """Oracle: Theorem 1. With N = 1 and A = -1 the decay is 1 - sigmoid, the forget gate of a recurrent network."""
    mixer = Mamba(d_state=1).build(5, generator).double()
    u = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    delta, A, _, _ = mixer.selected(u)
    before = F.linear(mixer.x_proj(u)[:, :1], mixer.dt_proj.weight) + mixer.dt_proj.bias
    assert_close((delta * A.T).exp(), 1 - before.sigmoid())


def test_initial_values(generator):
    """Oracle: the official code's rules: steps log-uniform in 1e-3 to 1e-1, A = -1, -2, ..., D = 1, uniform projections."""
    mixer = Mamba().build(1024, generator)
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.00099 < dt.min() < 0.00102 and 0.098 < dt.max() < 0.1001
    assert dt.log10().mean().item() == pytest.approx(-2, abs=0.05)
    assert dt.log10().var().item() == pytest.approx(2**2 / 12, rel=0.1)
    assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17).expand(2048, 16))
    assert (mixer.D == 1).all()
    assert mixer.dt_proj.weight.shape == (2048, 64)  # the width divided by 16
    assert mixer.dt_proj.weight.abs().max().item() == pytest.approx(64**-0.5, rel=1e-3)
    assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=1e-2)


@pytest.fixture
def hugging_face():
    """A small Mamba of transformers, wide weights, so that its states matter."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(initializer_range=0.3, **sizes)).eval()
    for layer in model.backbone.layers:
        nn.init.normal_(layer.mixer.x_proj.weight, std=0.5)
        nn.init.normal_(layer.mixer.conv1d.bias, std=0.5)
    return model


@torch.no_grad()
def test_checkpoint_of_transformers(hugging_face, tmp_path):
    """Oracle: transformers' logits (5.23), whole and token by token, and its greedy generation."""
    hugging_face.save_pretrained(tmp_path)
    model = load(tmp_path)
    theirs = hugging_face(TOKENS, use_cache=False).logits
    assert_close(model(TOKENS), theirs, rtol=1e-4, atol=1e-4)  # logits of size 10 through 2 layers
    states = States()
    stepped = torch.cat([model(token, states) for token in TOKENS.split(1, dim=1)], dim=1)
    assert_close(stepped, theirs, rtol=1e-4, atol=1e-4)
    new = hugging_face.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(TOKENS[:1], 8), new[:, 70:])
    for name in ("A_log", "D", "dt_proj.bias", "conv1d.bias"):  # negative control: each of them counts
        changed = load(tmp_path)
        changed.get_parameter(f"layers.0.mixer.{name}").add_(0.5)
        assert (changed(TOKENS) - theirs).abs().max() > 0.01
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half(TOKENS).dtype == torch.bfloat16
    assert (half(TOKENS).float() - theirs).norm() / theirs.norm() < 0.05


def test_checkpoints_that_are_not_supported(hugging_face, tmp_path):
    import json

    hugging_face.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"use_conv_bias": False}, "use_conv_bias=False is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"residual_in_fp32": False}, "residual_in_fp32=False"),
        ({"architectures": ["Mamba2ForCausalLM"]}, "supported: .'MambaForCausalLM'"),
        ({"state_size": 4}, "layers.0.mixer.A_log has shape"),
        ({"num_hidden_layers": 1}, "layers.1.mixer.A_log is unexpected"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Oracle: transformers' layer (5.23), which has no kernel on this processor and goes position by position."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    ours = Mamba().build(128, generator).eval()
    theirs = Theirs(MambaConfig(hidden_size=128, num_hidden_layers=1), 0).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 256, 128, generator=generator)

    def call(mixer):
        if what == "forward":
            with torch.no_grad():
                return mixer(x)
        mixer.zero_grad()
        y = mixer(x)
        y.square().sum().backward()
        return y.detach(), mixer.A_log.grad, mixer.in_proj.weight.grad

    peer(
        "mamba",
        "transformers",
        f"{what} of one layer, width 128, 16 numbers of state, 2 texts of 256 tokens",
        lambda: call(ours),
        lambda: call(theirs),
        within=1e-5,  # float32 rounding: a scan adds in another order
    )


def test_generation_holds_a_state_of_constant_size(generator):
    """Oracle: by hand, rows * layers * channels * (3 convolution inputs + 16 numbers of state) * 4 bytes."""
    config = LanguageModelConfig(vocabulary=61, d_model=8, n_layers=2)
    model = LanguageModel(config, lambda _: Mamba().build(8, generator)).initialize(generator)
    for n in (1, 20):
        states = States()
        model.generate(TOKENS[:, :5], n, cache=states)
        assert states.nbytes == 2 * 2 * 16 * (3 + 16) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 0}, "d_state=0 must be at least 1"),
        ({"d_conv": 0}, "d_conv=0"),
        ({"dt_rank": 0}, "dt_rank=0"),
        ({"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1 must be"),
        ({"dt_min": 0.0}, "dt_min=0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Mamba(**settings)
    with pytest.raises(ValueError, match="d_model=0"):
        Mamba().build(0)


def test_claim_constant_state(claim, generator):
    """Bytes of state after 4,096 tokens over those after 64."""
    mixer, peer = Mamba(d_state=4).build(8, generator), SoftmaxAttention(head_dim=4).build(8, generator)
    x = torch.randn(1, 4096, 8, generator=generator)
    held = {
        m: [state_bytes(m.extend(x[:, :time], m.initial_state(1))[1]) for time in (64, 4096)] for m in (mixer, peer)
    }
    assert held[peer][1] == 64 * held[peer][0]  # negative control: a cache of keys and values grows
    claim("mamba", "constant-state", held[mixer][1] / held[mixer][0])


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.numbers += out.numel()
        return out


@torch.no_grad()
def test_claim_linear_time(claim, generator):
    """Power of the length with which the numbers grow that are written in a forward, from 512 to 4,096 positions."""

    def power(mixer):
        counts = []
        for time in (512, 4096):
            with Written() as written:
                mixer(torch.randn(1, time, 8, generator=generator))
            counts.append(written.numbers)
        return math.log(counts[1] / counts[0], 8)

    def square(x):
        return (x @ x.mT).softmax(dim=-1) @ x

    assert power(square) > 1.9  # negative control: all pairs are seen as quadratic
    claim("mamba", "linear-time", power(Mamba(d_state=4).build(8, generator)))


def kept_for_the_gradient(function, parameters=()):
    """Bytes that autograd keeps of what `function` computes, without those of the parameters themselves."""
    own, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(kept.values())


def test_claim_training_memory(claim, generator):
    """Bytes that a scan keeps for the gradient over those of u, delta, B, C and y; 1,024 positions, 128 channels.

    Negative control: all states at once, by the parallel scan, keep several times as much.
    """
    time, channels, n = 1024, 128, 16
    u, delta = torch.randn(2, 1, time, channels, generator=generator).exp().requires_grad_()
    B, C = torch.randn(2, 1, time, n, generator=generator).requires_grad_()
    A, initial = -torch.ones(channels, n), torch.zeros(1, channels, n)

    def all_at_once():
        inputs = (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
        return linear_scan((delta.unsqueeze(-1) * A).exp(), inputs, initial) @ C.unsqueeze(-1)

    ends = 4 * (3 * u.numel() + 2 * B.numel())
    assert kept_for_the_gradient(all_at_once) > 5 * ends
    claim(
        "mamba", "training-memory", kept_for_the_gradient(lambda: selective_scan(u, delta, A, B, C, initial)[0]) / ends
    )


def test_claim_layer_memory(claim, generator):
    """Bytes that a layer of width 64 keeps for the gradient in bfloat16, a token and unit of width; the paper, which says
    "a token", means the latter too: its 12 for attention and 20 for an MLP are numbers of the model's width."""
    mixer = Mamba().build(64, generator).bfloat16()
    x = torch.randn(1, 1024, 64, generator=generator).bfloat16()
    claim("mamba", "layer-memory", kept_for_the_gradient(lambda: mixer(x), mixer.parameters()) / x.numel())


class TimeInvariant(MambaMixer):
    """The same block around a system whose step and maps do not depend on the input (Algorithm 1), as the convolution of
    Eq. (3): the row of Table 1 with Mamba's architecture and S4."""

    def __init__(self, d_model, config, generator):
        super().__init__(d_model, config, generator)
        self.B = nn.Parameter(torch.ones_like(self.A_log))
        self.C = nn.Parameter(torch.randn(self.A_log.shape, generator=generator))

    def extend(self, x, state):
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv1d(F.pad(u.mT, (self.config.d_conv - 1, 0))))
        delta, age = F.softplus(self.dt_proj.bias), torch.arange(x.shape[1] - 1.0, -1.0, -1.0)
        decay = (-age * (delta[:, None] * self.A_log.exp()).unsqueeze(-1)).exp()  # [channels, d_state, time]
        kernel = torch.einsum("dn,dnt->dt", delta[:, None] * self.B * self.C, decay)
        y = F.conv1d(F.pad(u, (x.shape[1] - 1, 0)), kernel.unsqueeze(1), groups=len(kernel))
        return self.gated(y.mT, u.mT, z), state


def test_the_time_invariant_block_is_the_scan_with_constant_maps(generator):
    """Oracle: `selective_scan` of one channel, its step and maps the same at every position."""
    mixer = TimeInvariant(2, Mamba(d_state=3, expand=1), generator)
    x, seen = torch.randn(1, 9, 2, generator=generator), []
    mixer.gated = lambda y, u, z: seen.append((y, u)) or y
    mixer(x)
    [(y, u)] = seen
    delta = F.softplus(mixer.dt_proj.bias)[0].expand(1, 9, 1)
    B, C = (p[0].expand(1, 9, 3) for p in (mixer.B, mixer.C))
    expected, _ = selective_scan(u[..., :1], delta, -mixer.A_log[:1].exp(), B, C, torch.zeros(1, 1, 3))
    assert_close(y[..., :1], expected)


def selective_copying_error(mixer, generator, steps=150, length=10, kept=2, batch=16):
    """Share of tokens that a small model gets wrong after training: `kept` of six tokens at random places among `length`
    fillers, to be told in order at the end."""
    config = LanguageModelConfig(vocabulary=8, d_model=32, n_layers=2)
    model = LanguageModel(config, lambda _: mixer(32, Mamba(d_state=8), generator)).initialize(generator)
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3)

    def draw(n):
        tokens = torch.zeros(n, length + kept, dtype=torch.long)
        data = torch.randint(2, 8, (n, kept), generator=generator)
        tokens.scatter_(1, torch.rand(n, length, generator=generator).argsort(1)[:, :kept].sort(1).values, data)
        tokens[:, length:] = 1
        return tokens, data

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        tokens, data = draw(batch)
        loss = F.cross_entropy(model(tokens)[:, length:].flatten(0, 1), data.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tokens, data = draw(512)
    with torch.no_grad():
        return float((model(tokens)[:, length:].argmax(-1) != data).float().mean())


def test_claim_selective_copying(claim):
    """Error of the selective system over that of the time-invariant one, after 150 steps; 2 tokens in 10 places."""
    selective, invariant = (
        selective_copying_error(mixer, torch.Generator().manual_seed(0)) for mixer in (MambaMixer, TimeInvariant)
    )
    assert invariant < 5 / 6 - 0.2  # negative control: it learns too, if less; a guess among six would be wrong 5 times
    claim("mamba", "selective-copying", selective / invariant)


def test_state_is_named():
    """Oracle: by hand, shapes of what a decoder keeps."""
    state = Mamba().build(8).initial_state(3)
    assert isinstance(state, State) and state.conv.shape == (3, 16, 3) and state.ssm.shape == (3, 16, 16)
