"""RWKV: transformers' checkpoints, the values a model starts with, its state, and what the paper claims."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl import testbed
from refimpl.architecture.alternatives.language_model import LanguageModelConfig, States
from refimpl.architecture.alternatives.other.rwkv import RWKV, RWKVModel, load
from refimpl.architecture.alternatives.protocol import state_bytes
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
from refimpl.testbed.tokenizer import VOCABULARY
from tests.architecture.alternatives.other.measures import power_of_the_length, recalled, trained_recaller

TOKENS = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(1))
ZERO = ({"key", "receptance", "output"}, {"receptance", "value"})  # over time, over channels
SMALL = LanguageModelConfig(vocabulary=61, d_model=16, n_layers=2, tied_embeddings=False)


@pytest.fixture
def hugging_face():
    """A small RWKV of transformers with wide weights, none of them at its initial value."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40}
    model = RwkvForCausalLM(RwkvConfig(rescale_every=0, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "time_" not in name:
                parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 2 else 1))
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def test_checkpoint_of_transformers(hugging_face, tmp_path):
    """Oracle: transformers' logits (5.23), whole and token by token, and its greedy generation."""
    hugging_face.save_pretrained(tmp_path)
    model = load(tmp_path)
    theirs = hugging_face(TOKENS, use_cache=False).logits
    assert_close(model(TOKENS), theirs, rtol=1e-4, atol=1e-4)  # logits of size 10 through 3 layers
    states = States()
    stepped = torch.cat([model(token, states) for token in TOKENS.split(1, dim=1)], dim=1)
    assert_close(stepped, theirs, rtol=1e-4, atol=1e-4)
    new = hugging_face.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(TOKENS[:1], 8), new[:, 70:])
    for name in ("0.mixer.time_decay", "2.mixer.time_first", "1.mixer.time_mix_receptance", "3.norm.bias"):
        changed = load(tmp_path)  # negative control: each of them counts
        changed.get_parameter(f"layers.{name}").add_(0.5)
        assert (changed(TOKENS) - theirs).abs().max() > 0.01
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half(TOKENS).dtype == torch.bfloat16
    assert (half(TOKENS).float() - theirs).norm() / theirs.norm() < 0.05


def test_checkpoints_that_are_not_supported(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001 is not supported"),
        ({"architectures": ["Rwkv5ForCausalLM"]}, "supported: .'RwkvForCausalLM'"),
        ({"intermediate_size": 41}, "layers.1.mixer.key.weight has shape"),
        ({"num_hidden_layers": 2}, "layers.4.mixer.key.weight is unexpected"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Oracle: transformers' layer (5.23), which has no kernel on this processor and goes position by position."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    ours = RWKV().build(128, generator, 0, 2).eval()
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=128, num_hidden_layers=2), 0).eval()
    shapes = {name: value.shape for name, value in theirs.named_parameters()}
    theirs.load_state_dict({name: value.view(shapes[name]) for name, value in ours.state_dict().items()})
    x = torch.randn(2, 256, 128, generator=generator)

    def call(layer, run):
        if what == "forward":
            with torch.no_grad():
                return run(x)
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), layer.time_decay.grad, layer.key.weight.grad

    peer(
        "rwkv",
        "transformers",
        f"{what} of the time mixing, width 128, 2 texts of 256 tokens",
        lambda: call(ours, ours),
        lambda: call(theirs, lambda x: theirs(x)[0]),
        within=1e-4,  # float32 rounding: a scan adds in another order
    )


def test_a_new_model_passes_embeddings_through(generator):
    """Oracle: the official rules. No branch adds anything, so the logits are those of the normalized embedding; all that is
    tiny is the embedding itself."""
    model = RWKV().language_model(SMALL, generator)
    x = model.embedding.weight[TOKENS]
    assert x.abs().max() <= 1e-4 and x.abs().mean().item() == pytest.approx(5e-5, rel=0.05)
    for _ in range(2):
        x = F.layer_norm(x, (16,))
    assert_close(model(TOKENS), x @ model.lm_head.weight.T, rtol=1e-3, atol=1e-4)
    assert_close(model.lm_head.weight.T @ model.lm_head.weight, 0.25 * 61 / 16 * torch.eye(16))
    for name, parameter in model.named_parameters():
        if ".mixer." in name and name.endswith(".weight"):
            _, layer, _, matrix, _ = name.split(".")
            assert (parameter == 0).all() == (matrix in ZERO[int(layer) % 2]), name


def test_generation_holds_five_numbers_a_channel(generator):
    """Oracle: by hand, rows * layers * width * (2 inputs before + 3 of sums) * 4 bytes."""
    model = RWKV().language_model(SMALL, generator)
    for n in (1, 20):
        states = States()
        model.generate(TOKENS[:, :5], n, cache=states)
        assert states.nbytes == 2 * 2 * 16 * (2 + 3) * 4


def test_settings_are_checked():
    for settings, message in [({"channels": 0}, "channels=0 must be at least 1"), ({"d_ff": 0}, "d_ff=0")]:
        with pytest.raises(ValueError, match=message):
            RWKV(**settings)
    with pytest.raises(ValueError, match="d_model=0"):
        RWKV().build(0)
    with pytest.raises(ValueError, match="layer=2 must be in 0 to 1, n_layers=2"):
        RWKV().build(8, layer=2, n_layers=2)


def test_claim_constant_state(claim, generator):
    """Bytes of state after 4,096 tokens over those after 64."""
    mixer, peer = RWKV().build(8, generator), SoftmaxAttention(head_dim=4).build(8, generator)
    x = torch.randn(1, 4096, 8, generator=generator)
    held = {
        m: [state_bytes(m.extend(x[:, :time], m.initial_state(1))[1]) for time in (64, 4096)] for m in (mixer, peer)
    }
    assert held[peer][1] == 64 * held[peer][0]  # negative control: a cache of keys and values grows
    claim("rwkv", "constant-state", held[mixer][1] / held[mixer][0])


def test_claim_linear_time(claim, generator):
    """Power of the length with which the numbers grow that are written in a forward, from 512 to 4,096 positions."""
    quadratic = power_of_the_length(lambda x: (x @ x.mT).softmax(dim=-1) @ x, generator)
    assert quadratic > 1.9  # negative control: all pairs are seen as quadratic
    claim("rwkv", "linear-time", power_of_the_length(RWKV().build(8, generator), generator))


class Usual(RWKVModel):
    """Embeddings of the usual size, and no normalization after them."""

    def embedded(self, x):
        return x


def loss_after(kind, std, steps=40):
    """Cross-entropy on held-out text after some steps on the testbed's: 2 layers of width 64, 8 rows of 32 tokens a step."""
    generator = torch.Generator().manual_seed(0)
    text, test = testbed.corpus.tokens("train", 30_000), testbed.corpus.tokens("held-out", 64 * 33).view(64, 33)
    config = LanguageModelConfig(vocabulary=VOCABULARY, d_model=64, n_layers=2, tied_embeddings=False)
    model = kind(config, RWKV(), generator).initialize(generator, std=std)
    if kind is Usual:
        nn.init.normal_(model.embedding.weight, std=std, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)

    def loss(rows):
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(steps):
        starts = torch.randint(0, len(text) - 33, (8,), generator=generator).tolist()
        value = loss(torch.stack([text[start : start + 33] for start in starts]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return loss(test).item()


def test_claim_small_embedding(claim):
    """Cross-entropy after 40 steps over that of embeddings of deviation 0.02 without the normalization."""
    small, usual = loss_after(RWKVModel, 1e-4), loss_after(Usual, 0.02)
    assert usual < math.log(VOCABULARY) - 0.5  # negative control: it learns too
    claim("rwkv", "small-embedding", small / usual)


def test_claim_weak_recall(claim):
    """Share of 4 pairs recalled over that of softmax attention, after 100 steps."""
    ours, theirs = (recalled(trained_recaller(m)) for m in (RWKV(), SoftmaxAttention(head_dim=16)))
    assert ours > 2 / 16 and theirs > 0.9  # negative controls: it does better than a guess, and the task can be learnt
    claim("rwkv", "weak-recall", ours / theirs)
