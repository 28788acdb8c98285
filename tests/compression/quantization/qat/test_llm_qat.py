"""LLM-QAT: first tokens counted, loss by hand, grids by the official formula, and which outputs are cached."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.compression.quantization.qat import llm_qat
from refimpl.compression.quantization.qat.llm_qat import LLMQAT, MinMaxLinear, keys_and_values
from refimpl.compression.quantization.qat.protocol import QAT
from refimpl.compression.quantization.quantized_attention import QuantizedAttention
from refimpl.model.train import perplexity, train, windows
from tests.compression.conftest import VOCABULARY, decoder, gpt2, llama, opt
from tests.compression.quantization.qat.conftest import BATCH, LENGTH


def test_every_token_begins_a_row_once_before_any_does_twice(monkeypatch):
    """Oracle: counting, with rows that do not divide the vocabulary, and more of them than it has; 3, 4 and 5 tokens that are not drawn
    take turns.
    """
    greedy = []

    def noted(_teacher, first, count, length, _generator):
        greedy.append(count)
        return first[:, None].expand(-1, length)

    monkeypatch.setattr(llm_qat, "written", noted)
    for batch in (10, 100):
        batches = LLMQAT().batches(decoder(), None, batch, 5, torch.Generator().manual_seed(0))
        first = torch.cat([next(batches)[:, 0] for _ in range(3 * VOCABULARY // batch + 1)])
        for epoch in range(3):
            assert len(first[epoch * VOCABULARY : (epoch + 1) * VOCABULARY].unique()) == VOCABULARY
        assert not torch.equal(first[:VOCABULARY], first[VOCABULARY : 2 * VOCABULARY])
    assert greedy == [*([3, 4, 5] * 7)[:19], 3, 4]
    with pytest.raises(ValueError, match="length=3 must be at least 4: 5 tokens of a row are not drawn"):
        next(LLMQAT().batches(decoder(), None, 4, 3, torch.Generator()))


def test_no_text_is_looked_at():
    """Oracle: a text that can't be read."""

    class Unreachable:
        def __getattr__(self, name):
            raise AssertionError(name)

    batch = next(LLMQAT().batches(decoder(), Unreachable(), 3, 6, torch.Generator().manual_seed(0)))
    assert batch.shape == (3, 7)


def test_the_loss_by_hand():
    """Oracle: by hand: teacher's chances 3/4 and 1/4, student's 1/2 each: ln 2; the last token is not read."""
    teacher, student = (nn.Sequential(nn.Embedding(2, 2)) for _ in range(2))
    teacher[0].weight.data.copy_(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log())
    student[0].weight.data.zero_()
    loss = LLMQAT().loss(student, teacher, torch.tensor([[0, 1, 1]]))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert_close(
        student[0].weight.grad, torch.tensor([[-0.25, 0.25], [-0.25, 0.25]]) / 2
    )  # q - p, a mean over two positions
    assert teacher[0].weight.grad is None
    student[0].weight.data.copy_(teacher[0].weight.data)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert LLMQAT().loss(student, teacher, torch.tensor([[0, 1]])).item() == pytest.approx(entropy)


def test_the_teacher_reads_in_evaluation_mode_and_gets_its_mode_back():
    """Oracle: dropout, which would make two readings differ."""
    teacher = nn.Sequential(nn.Embedding(5, 5), nn.Dropout(0.5))
    student = copy.deepcopy(teacher).eval()
    losses = {LLMQAT().loss(student, teacher, torch.tensor([[0, 1, 2, 3]])).item() for _ in range(3)}
    assert len(losses) == 1 and teacher.training


def official(x, bits):
    """The official SymQuantizer without its two 1e-6, a row at a time."""
    s = (2 ** (bits - 1) - 1) / x.abs().amax(dim=-1, keepdim=True)
    return torch.round(x * s) / s


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_grids_by_the_official_formula(bits, generator):
    """Oracle: the formula: weights by output channel, inputs and outputs by token; nothing is clipped, so all gradients are 1."""
    layer = nn.Linear(16, 12)
    layer.weight.data.normal_(std=3, generator=generator)  # beyond 2 too, where the official code stops the gradient
    fake = MinMaxLinear(layer, LLMQAT(bits=bits, activation_bits=bits, kv_bits=bits), [slice(4, 12)])
    x = torch.randn(2, 3, 16, generator=generator, requires_grad=True)
    assert_close(fake.rounded(), official(layer.weight, bits))
    assert_close(fake.read(x), official(x, bits))
    plain = nn.functional.linear(official(x, bits), official(layer.weight, bits), layer.bias)
    out = fake(x)
    assert_close(out[..., :4], plain[..., :4], rtol=1e-4, atol=1e-4)
    assert_close(out[..., 4:], official(plain[..., 4:], bits), rtol=1e-4, atol=1e-4)
    upstream = torch.randn(2, 3, 12, generator=generator)
    (out * upstream).sum().backward()
    assert_close(fake.weight.grad, torch.einsum("bto,bti->oi", upstream, official(x, bits).detach()))
    assert_close(x.grad, upstream @ official(layer.weight, bits).detach())


@pytest.mark.parametrize("build", [decoder, llama, opt, gpt2])
def test_keys_and_values_are_found(build, tokens):
    """Oracle: what the converted model's own cache holds: rows of at most 15 levels, where keys are not rotated."""
    model = build()
    parts = keys_and_values(model)
    assert len(parts) == 4 * (1 if build is gpt2 else 2)
    method = LLMQAT()
    small = method.convert(method.prepare(model))
    for name, slices in parts.items():
        seen = []
        hook = small.get_submodule(name).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        small(tokens)
        hook.remove()
        for part in slices:
            row = seen[0][0, 5, part]
            assert_close(row, official(row, 4))
            assert part.stop - part.start == (16 if build in (decoder, llama) else 32)
        if build is gpt2:
            queries = seen[0][0, 5, :32]
            assert [part.start for part in slices] == [32, 64] and not torch.allclose(
                queries, official(queries, 4), atol=1e-3
            )


def test_without_a_cache_to_round_any_model_will_do(generator):
    """Oracle: a network without attention; with `kv_bits` its layout would have to be known."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    method = LLMQAT(kv_bits=None)
    small = method.convert(method.prepare(model))
    assert small(torch.randn(5, 8, generator=generator)).shape == (5, 3)
    with pytest.raises(ValueError, match="no blocks"):
        LLMQAT().prepare(model)


def test_weights_alone(generator):
    """Oracle: the formula; bytes by arithmetic: half a byte a weight, four a channel."""
    method, layer = LLMQAT(activation_bits=None, kv_bits=None), nn.Linear(16, 6)
    held = method.convert(method.prepare(nn.Sequential(layer)))[0].compressed
    assert_close(held.dense(), official(layer.weight.detach(), 4))
    assert held.nbytes == 16 * 6 // 2 + 4 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 must be 2 to 8; the paper's"),
        ({"activation_bits": 9}, "activation_bits=9 must be 2 to 8, or None"),
        ({"kv_bits": 1}, "kv_bits=1 must be 2 to 8, or None"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LLMQAT(**change)


def test_an_attention_that_another_method_has_changed_is_left_to_it():
    """Oracle: its type."""
    model = decoder()
    model.layers[1].attention = QuantizedAttention.of(model.layers[1].attention, 4)
    small = LLMQAT().convert(LLMQAT().prepare(model))
    assert type(small.layers[1].attention) is QuantizedAttention


STEPS = 24


@pytest.fixture(scope="module")
def own_text(trained):
    """What the small language model writes, a batch for each step."""
    batches = LLMQAT().batches(trained.model, None, BATCH, LENGTH, torch.Generator().manual_seed(1))
    return [next(batches) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def learned(trained):
    """`learned(method, batches)`: the model trained on the batches or not, and converted."""

    def learn(method, batches, loss=None, original=trained.model):
        model = method.prepare(original)
        if batches:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
            objective = loss or (lambda student, batch: method.loss(student, original, batch))
            train(model, optimizer, iter(batches), STEPS, loss=objective, schedule=lambda progress: 1 - progress)
        return method.convert(model)

    return learn


@pytest.fixture(scope="module")
def added(trained, learned):
    """`added(method, batches)`: the loss on unseen text that `learned` gives more than the original."""
    nats = lambda model: math.log(perplexity(model, trained.unseen, LENGTH, batch=64))  # noqa: E731
    base = nats(trained.model)
    return lambda *args, **options: nats(learned(*args, **options)) - base


@pytest.fixture(scope="module")
def at_3_bits(added, own_text):
    """The loss added at 3-bit weights, 8-bit activations and a 4-bit cache."""
    return added(LLMQAT(bits=3), own_text)


def test_claim_beats_rounding_at_3_8_4(added, at_3_bits, claim):
    """Loss added over that added by rounding, 3-8-4 bits."""
    claim("llm-qat", "beats-rounding-at-3-8-4", at_3_bits / added(LLMQAT(bits=3), []))


def test_claim_beats_rounding_at_4_8_4_with_outliers(trained, added, own_text, claim):
    """Loss added over that added by rounding, 4-8-4 bits; each eighth channel that a norm makes ten times as large, the same function."""
    model = copy.deepcopy(trained.model)
    for block in anatomy(model).blocks:
        for feed in feeds(model, block):
            if feed.producer in (block.attention_norm, block.feed_forward_norm):
                rescale_(model, feed, torch.ones(48).index_fill(0, torch.arange(1, 48, 8), 0.1))
    ours, rounded = (added(LLMQAT(), batches, original=model) for batches in (own_text, []))
    claim("llm-qat", "beats-rounding-at-4-8-4-with-outliers", ours / rounded)


@torch.no_grad()
def test_claim_beats_rounding_at_4_8_4(trained, learned, own_text, claim):
    """Divergence from the original's predictions on unseen text over that after rounding, 4-8-4 bits. The loss added is not looked at
    here: the steps of training alone move it by as much.
    """
    rows = trained.unseen[: 64 * LENGTH].view(64, LENGTH)
    expected = trained.model(rows).log_softmax(dim=-1)
    with torch.enable_grad():
        models = [learned(LLMQAT(), batches) for batches in (own_text, [])]
    ours, rounded = (
        F.kl_div(model(rows).log_softmax(dim=-1), expected, reduction="sum", log_target=True) for model in models
    )
    claim("llm-qat", "beats-rounding-at-4-8-4", ours / rounded)


def test_claim_soft_labels(added, own_text, at_3_bits, claim):
    """Loss added over that added by learning the tokens of the same text, 3-8-4 bits."""
    method = LLMQAT(bits=3)
    labels = added(method, own_text, lambda student, batch: QAT.loss(method, student, student, batch))
    claim("llm-qat", "soft-labels-are-better", at_3_bits / labels)


@pytest.mark.parametrize(("name", "size"), [("own-text-is-as-good", None), ("narrow-text-is-worse", 120)])
def test_claim_own_text(name, size, trained, added, at_3_bits, claim):
    """Loss added over that added by learning from as many rows of the real text, or of its first 120 tokens, 3-8-4 bits."""
    real = windows(trained.text[:size], BATCH, LENGTH, torch.Generator().manual_seed(1))
    claim("llm-qat", name, at_3_bits / added(LLMQAT(bits=3), [next(real) for _ in range(STEPS)]))
