"""Griffin: transformers' RecurrentGemma checkpoints, the values a model starts with, its bytes, and what the paper claims."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl import testbed
from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.language_model import LanguageModelConfig, States
from refimpl.architecture.alternatives.other.griffin import Griffin, load
from refimpl.architecture.alternatives.protocol import state_bytes
from refimpl.testbed.tokenizer import VOCABULARY, tokenizer
from tests.architecture.alternatives.other.measures import power_of_the_length, recalled, trained_recaller

TOKENS = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hugging_face():
    """A small RecurrentGemma of transformers, wide weights, a window that the text leaves behind."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 60, "lru_width": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 20}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("recurrent_param"):
                parameter.copy_(0.25 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def test_checkpoint_of_transformers(hugging_face, tmp_path):
    """Oracle: transformers' logits (5.23) on a text of three windows, whole and token by token, and its greedy generation."""
    hugging_face.save_pretrained(tmp_path)
    model = load(tmp_path)
    theirs = hugging_face(TOKENS, use_cache=False).logits
    assert_close(model(TOKENS), theirs, rtol=1e-4, atol=1e-4)  # logits of size 5 through 4 layers
    for cuts in ([1] * 70, [9, 25, 1, 35]):
        states = States()
        pieces = torch.cat([model(part, states) for part in TOKENS.split(cuts, dim=1)], dim=1)
        assert_close(pieces, theirs, rtol=1e-4, atol=1e-4)
    new = hugging_face.generate(TOKENS[:1, :30], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(TOKENS[:1, :30], 8), new[:, 30:])
    for name in ("0.mixer.recurrent_param", "2.mixer.conv_1d.bias", "4.mixer.q_proj.weight", "5.norm.weight"):
        changed = load(tmp_path)  # negative control: each of them counts
        changed.get_parameter(f"layers.{name}").add_(0.5)
        assert (changed(TOKENS) - theirs).abs().max() > 0.01
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half(TOKENS).dtype == torch.bfloat16
    assert (half(TOKENS).float() - theirs).norm() / theirs.norm() < 0.05


@torch.no_grad()
def test_settings_of_a_checkpoint_count(hugging_face, tmp_path):
    """Negative controls: window, cap of the logits and scale of the embeddings each change what transformers computes."""
    hugging_face.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = hugging_face(TOKENS, use_cache=False).logits
    for change in ({"attention_window_size": 21}, {"logits_soft_cap": 3.0}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert (load(tmp_path)(TOKENS) - theirs).abs().max() > 0.01, change
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert model.scale == 4.90625  # the root of 24 in bfloat16
    model.scale = 24**0.5
    assert (model(TOKENS) - theirs).abs().max() > 1e-3


def test_checkpoints_that_are_not_supported(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rotary = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "rope_type": "default"}
    for change, message in [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"rope_parameters": rotary}, "rope_parameters="),
        ({"architectures": ["GemmaForCausalLM"]}, "supported: .'RecurrentGemmaForCausalLM'"),
        ({"lru_width": 22}, "layers.0.mixer.conv_1d.bias has shape"),
        ({"num_hidden_layers": 3}, "layers.6.mixer.conv_1d.bias is unexpected"),
        ({"block_types": ["recurrent"]}, "layers.4.mixer.conv_1d.bias is missing"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Oracle: transformers' recurrent block (5.23), which goes position by position."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    ours = Griffin().block("recurrent", 128, generator).eval()
    theirs = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(hidden_size=128, num_attention_heads=4), 0).eval()
    names = {name.replace("rg_lru.", ""): name for name in theirs.state_dict()}
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x, positions = torch.randn(2, 256, 128, generator=generator), torch.arange(256)[None]

    def call(block, run):
        if what == "forward":
            with torch.no_grad():
                return run(x)
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), block.linear_x.weight.grad, block.conv_1d.weight.grad

    peer(
        "griffin",
        "transformers",
        f"{what} of the recurrent block, width 128, 2 texts of 256 tokens",
        lambda: call(ours, ours),
        lambda: call(theirs, lambda x: theirs(x, positions, None, use_cache=False)[0]),
        within=1e-4,  # float32 rounding: a scan adds in another order
    )


def test_a_model_and_its_bytes(generator):
    """Oracle: by hand: layers by the pattern; variances of 1/width and 2/(layers width); bytes of what each block keeps."""
    config = LanguageModelConfig(vocabulary=61, d_model=64, n_layers=4)
    model = Griffin(n_heads=2, window=8, lru_width=96).language_model(config, generator)
    kinds = [type(block.mixer).__name__ for block in model.layers[::2]]
    assert kinds == ["RecurrentBlock", "RecurrentBlock", "AttentionBlock", "RecurrentBlock"]
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert model.layers[0].mixer.linear_out.weight.std().item() == pytest.approx((2 / 4 / 96) ** 0.5, rel=0.03)
    assert model.layers[1].mixer.down_proj.weight.std().item() == pytest.approx((2 / 4 / 192) ** 0.5, rel=0.03)
    assert model.layers[1].mixer.gate_proj.weight.std().item() == pytest.approx(1 / 8, rel=0.03)
    for n in (1, 20):
        states = States()
        model.generate(TOKENS[:, :5], n, cache=states)
        recurrent, attention = 2 * 96 * (3 + 1) * 4 + 1, 2 * 2 * 8 * 32 * 4 + 8
        assert states.nbytes == 3 * recurrent + attention


def test_scale_and_cap(generator):
    """Oracle: the formulas; embeddings by the root of the width in bfloat16, logits by 30 tanh(x / 30)."""
    config = LanguageModelConfig(vocabulary=61, d_model=24, n_layers=2, norm_eps=1e-6)
    plain, gemma = (
        Griffin(n_heads=2).language_model(config, torch.Generator().manual_seed(0), **options)
        for options in ({}, {"scale_embeddings": True, "logit_cap": 2.0})
    )
    x = gemma.embedding(TOKENS)
    assert_close(gemma(TOKENS), 2 * (plain(4.90625 * x) / 2).tanh())
    assert (gemma(TOKENS) - plain(TOKENS)).abs().max() > 0.1


def test_settings_are_checked():
    for settings, message in [
        ({"pattern": ()}, r"pattern=\(\) must be of 'recurrent' and 'attention'"),
        ({"pattern": ("global",)}, "pattern="),
        ({"n_heads": 0}, "n_heads=0 must be at least 1"),
        ({"window": 0}, "window=0"),
        ({"d_conv": 0}, "d_conv=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Griffin(**settings)
    with pytest.raises(ValueError, match="d_model=0"):
        Griffin().build(0)


def test_claim_constant_state(claim, generator):
    """Bytes of state after 4,096 tokens over those after 64, window 32."""
    mixer = Griffin(n_heads=2, window=32).build(8, generator)
    x = torch.randn(1, 4096, 8, generator=generator)
    short, long = (state_bytes(mixer.extend(x[:, :time], mixer.initial_state(1))[1]) for time in (64, 4096))
    assert short == 2 * (8 * (3 + 1) * 4 + 1) + 2 * 32 * 4 * 4 + 8
    claim("griffin", "constant-state", long / short)


def test_claim_linear_time(claim, generator):
    """Power of the length with which the numbers grow that are written in a forward, from 512 to 4,096 positions."""
    claim("griffin", "linear-time", power_of_the_length(Griffin(n_heads=2, window=32).build(8, generator), generator))


def test_claims_of_recall(claim):
    """Share of 4 pairs recalled over that of Hawk of equal depth, after 80 steps on texts of 16 tokens, 4 of them values
    without a key between the pairs and the questions; and, of the same model, in texts of 64 tokens over that in these.

    Negative control: with a window of 2 in the same model the pairs lie outside.
    """
    griffin, hawk = (
        trained_recaller(Griffin(n_heads=2, window=64, pattern=pattern), steps=80, fillers=4, rate=1e-2)
        for pattern in (("recurrent", "attention"), ("recurrent", "recurrent"))
    )
    share, far = recalled(griffin, fillers=4), recalled(griffin, fillers=52)
    for block in griffin.model.layers:
        block.mixer.blocks[1].window = 2
    assert recalled(griffin, fillers=4) < 0.7 * share
    assert share > 0.7  # it has learnt the task
    claim("griffin", "recall-in-window", share / recalled(hawk, fillers=4))
    claim("griffin", "extrapolation-recall", far / share)


@torch.no_grad()
def test_claim_recall_ends_with_the_window(claim):
    """Share of needles of which every word is the likeliest after those before it; one nearer than the window of the trained model, one beyond it."""
    model = trained.load(Griffin, dtype=torch.float32)
    assert {block.mixer.window for block in model.blocks if hasattr(block.mixer, "window")} == {256}

    def found(depth):
        samples = testbed.tasks.samples("needle", 12, 704, torch.Generator().manual_seed(0), depth=depth)
        right = 0
        for sample in samples:
            prompt, answer = (
                tokenizer().encode(text).ids for text in (sample.context + sample.question, sample.answer)
            )
            said = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(dim=-1)
            right += said.tolist() == answer
        return right / len(samples)

    claim("griffin", "recall-ends-with-the-window", found(0.8) - found(0.1))


def test_claim_extrapolation(claim):
    """Cross-entropy of the same held-out tokens with contexts of up to 4 training lengths over that with half to one of them.

    A model of 3 layers and width 64, window 16, after 30 steps on 8 rows of 32 tokens of the testbed's text.
    """
    generator = torch.Generator().manual_seed(0)
    config = LanguageModelConfig(vocabulary=VOCABULARY, d_model=64, n_layers=3, norm_eps=1e-6)
    model = Griffin(n_heads=4, window=16).language_model(config, generator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    text, test = testbed.corpus.tokens("train", 30_000), testbed.corpus.tokens("held-out", 24 * 129).view(24, 129)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10) * (1 - step / 30)
        starts = torch.randint(0, len(text) - 33, (8,), generator=generator).tolist()
        rows = torch.stack([text[start : start + 33] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        long = F.cross_entropy(model(test[:, :-1])[:, 32:].flatten(0, 1), test[:, 33:].flatten())
        rows = test[:, 16:].unfold(1, 33, 16).flatten(0, 1)  # 32 tokens each; the second half of them is asked for
        short = F.cross_entropy(model(rows[:, :-1])[:, 16:].flatten(0, 1), rows[:, 17:].flatten())
        assert rows[:, 17:].flatten().sort()[0].equal(test[:, 33:].flatten().sort()[0])  # the same targets
    assert short < 7.0  # negative control: it has learnt; a guess among 2,048 tokens costs 7.6
    claim("griffin", "extrapolation", (long / short).item())
