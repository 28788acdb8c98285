"""What holds for every method that trains through its quantization; the list of methods is the taxonomy's."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.compression.folder import load_compressed, save_compressed
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.qat.llm_qat import LLMQAT
from refimpl.compression.quantization.qat.protocol import QAT, FakeLinear, exchanged, logits_of
from refimpl.compression.quantization.qat.ste_qat import STEQAT
from refimpl.model.cache import FullCache
from refimpl.model.model import Attention
from refimpl.model.train import train
from tests.compression.conftest import VOCABULARY, decoder, decoder_with_biases, differences, with_a_plainer_module

METHODS = taxonomy.load().find(category="compression/quantization/qat", implemented=True)
TEXT = torch.randint(0, VOCABULARY, (400,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def method(request):
    """A method at its default settings."""
    return request.param.load()()


def shown(method, model, tokens):
    """A prepared copy that has met a batch in training mode, so that grids of activations are placed."""
    student = method.prepare(model)
    with torch.no_grad():
        student(tokens)
    return student


def learned(method, teacher, steps=20, seed=3, lr=3e-3):
    """A copy that is trained on one batch, and the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    student = method.prepare(teacher)
    batch = next(method.batches(teacher, TEXT, 3, 12, generator))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    losses = train(student, optimizer, iter([batch] * steps), steps, loss=lambda m, b: method.loss(m, teacher, b))
    return student, batch, losses


def test_there_are_methods():
    assert len(METHODS) >= 1


def test_the_model_given_is_not_written(method, build, tokens):
    """Oracle: its state before, bit by bit, its modules, its mode, and that it has no gradient; through training and `convert`."""
    model = build()
    before, modules = copy.deepcopy(model.state_dict()), [*model.modules()]
    student = shown(method, model, tokens)
    assert student.training and not model.training
    method.loss(student, model, tokens).backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    trained = copy.deepcopy(student.state_dict())
    small = method.convert(student)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [*model.modules()] == modules and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(trained[name], value) for name, value in student.state_dict().items()) and student.training
    assert not small.training
    for one, other in ((model, student), (student, small)):
        assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.state_dict().values()}


def test_a_gradient_reaches_every_parameter(method, build, tokens):
    """Oracle: autograd; of matrices no gradient is all zeros."""
    model = build()
    student = method.prepare(model)
    method.loss(student, model, tokens).backward()
    assert sum(isinstance(module, FakeLinear) for module in student.modules()) >= 4 * 4
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.ndim < 2 or parameter.grad.any(), name


def test_what_is_converted_computes_what_was_trained(method, build, tokens, logits, generator):
    """Oracle: the trained layers and the trained model in evaluation mode: `convert` changes nothing but the storage.

    Layer by layer to rounding; through a model a sum taken in another order may turn a code here and there into its neighbour.
    """
    model = build()
    student = shown(method, model, tokens).eval()
    small = method.convert(student)
    for name, fake in student.named_modules():
        if isinstance(fake, FakeLinear):
            x = torch.randn(3, 5, fake.weight.shape[1], generator=generator)
            with torch.no_grad():
                assert_close(
                    small.get_submodule(name)(x), fake(x), rtol=1e-4, atol=1e-4
                )  # sums of 40 products of size 1
    expected = logits(student, tokens)
    assert (logits(small, tokens) - expected).norm() < 0.01 * expected.norm()
    assert (expected - logits(model, tokens)).norm() > 0.02 * expected.norm()  # negative control: it is quantized


def test_packed_bytes_are_held_and_no_master_copy(method, build, tokens):
    """Oracle: the storage of all that the model's state holds, against that of the weights in float32."""
    student = shown(method, build(), tokens)
    small = method.convert(student)
    packed = [module for module in small.modules() if isinstance(module, CompressedLinear)]
    fakes = [module for module in student.modules() if isinstance(module, FakeLinear)]
    assert len(packed) == len(fakes) and not any(isinstance(module, FakeLinear) for module in small.modules())
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in packed for t in m.state_dict().values()
    }
    assert sum(held.values()) < 0.45 * sum(
        fake.weight.nbytes for fake in fakes
    )  # scales and biases of layers 32 wide included
    assert all(isinstance(layer.compressed.dense(), torch.Tensor) for layer in packed)
    assert not {id(p) for layer in packed for p in layer.parameters()}


def test_training_lowers_the_loss_of_what_is_converted(method):
    """Oracle: the converted model before training; 20 steps on one batch."""
    teacher = decoder()
    student, batch, losses = learned(method, teacher)
    untrained = method.convert(shown(method, teacher, batch[:, :-1]))
    with torch.no_grad():
        after, before = (float(method.loss(m, teacher, batch)) for m in (method.convert(student), untrained))
    assert losses[-1] < losses[0] - 0.3
    assert after < before - 0.3  # nats; of a cross-entropy under soft labels the teacher's entropy remains


def test_the_same_seed_gives_the_same_model_and_nothing_is_left(method):
    """Oracle: the first run; a configuration holds nothing of a model."""
    teacher, fresh = decoder(), copy.deepcopy(method)
    first = learned(method, teacher, 3)
    second = learned(method, teacher, 3)
    assert first[2] == second[2] and method == fresh
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name])
    assert learned(method, teacher, 3, seed=4)[2] != first[2]


def test_saving_and_loading_is_the_identity(method, build, tokens, logits, tmp_path):
    """Oracle: what was saved; a model that came from other weights takes its state, trained or converted."""
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    one, two = shown(method, build(), tokens).eval(), shown(method, other, tokens.flip(1)).eval()
    for first, second in ((one, two), (method.convert(one), method.convert(shown(method, other, tokens.flip(1))))):
        expected = logits(first, tokens)
        assert not torch.equal(logits(second, tokens), expected)
        save_file({name: value.clone() for name, value in first.state_dict().items()}, tmp_path / "state.safetensors")
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert torch.equal(logits(second, tokens), expected)


def test_a_folder_gives_back_the_model(method, tokens, tmp_path):
    """Oracle: the converted model in memory, bit by bit: its modules, bytes, logits, and bytes in a cache."""
    small = method.convert(shown(method, decoder_with_biases(), tokens))
    save_compressed(small, tmp_path / "small")
    assert differences(load_compressed(tmp_path / "small"), small, tokens) == []
    assert differences(decoder_with_biases(), small, tokens) != []  # negative control


@pytest.mark.parametrize(
    ("place", "plain", "seen"),
    [
        (["attention"], Attention, {"bytes of the cache"}),
        (["attention", "v_proj"], CompressedLinear, {"logits"}),  # a cache of packed rows rounds them itself
    ],
)
def test_one_module_that_is_dropped_is_seen(place, plain, seen, tokens, tmp_path):
    """Oracle: the model in memory; of one of LLM-QAT's modules in the folder a plainer one is made."""
    small = LLMQAT().convert(LLMQAT().prepare(decoder_with_biases()))
    save_compressed(small, tmp_path / "small")
    again = with_a_plainer_module(tmp_path / "small", place, plain)
    assert {"modules", *seen} <= set(differences(again, small, tokens))


def test_a_batch_equals_its_rows_and_a_cached_step_reading_at_once(method, build, architecture, tokens, logits):
    """Oracle: the rows one by one; one forward over all tokens."""
    small = method.convert(shown(method, build(), tokens))
    whole = logits(small, tokens)
    close = {"rtol": 1e-3, "atol": 1e-3}  # as above
    assert_close(torch.cat([logits(small, row[None]) for row in tokens]), whole, **close)
    with torch.no_grad():
        if architecture == "decoder":
            cache = FullCache(small.config.sliding_window)
            parts = [small(tokens[:, :7], cache), *(small(tokens[:, i : i + 1], cache) for i in range(7, 11))]
        else:
            start = small(tokens[:, :7], use_cache=True)
            parts = [start.logits, small(tokens[:, 7:], past_key_values=start.past_key_values).logits]
    assert_close(torch.cat(parts, dim=1), whole, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_followed(method, dtype, tokens, logits):
    """Oracle: the float32 model's logits on the same weights, to what the dtype resolves; every tensor of before keeps its dtype."""
    student = shown(method, decoder().to(dtype), tokens)
    loss = method.loss(student, decoder().to(dtype), tokens)
    loss.backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in student.parameters())
    small = method.convert(student)
    out = logits(small, tokens)
    assert out.dtype == dtype and student.layers[0].attention.q_proj.weight.dtype == dtype
    if dtype == torch.float64:
        assert_close(out.float(), logits(method.convert(shown(method, decoder(), tokens)), tokens), rtol=0.02, atol=0.2)


def test_what_is_prepared_is_not_prepared_again_and_what_is_not_is_not_converted(method):
    model = decoder()
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.attention\.q_proj' is prepared already"):
        method.prepare(method.prepare(model))
    with pytest.raises(ValueError, match="Decoder has no layer to convert: call `prepare` first"):
        method.convert(model)
    with pytest.raises(ValueError, match="matches no linear layer"):
        method.prepare(model, target=["none*"])
    model.layers[0].attention.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        method.prepare(model)


def test_layers_are_chosen(method):
    """Oracle: the names; others stay as they are."""
    wanted = ["layers.1.feed_forward.*", "layers.2.attention.*"]
    student = method.prepare(decoder(), target=wanted, skip=["*.down_proj"])
    names = [name for name, module in student.named_modules() if isinstance(module, FakeLinear)]
    expected = [f"layers.1.feed_forward.{name}_proj" for name in ("gate", "up")]
    assert names == sorted([*expected, *(f"layers.2.attention.{name}_proj" for name in "qkvo")], key=names.index)
    assert isinstance(student.layers[0].attention.q_proj, nn.Linear)


def test_texts_have_their_shape(method):
    """Oracle: what was asked for; a data-free method is given no text at all."""
    data_free = type(method).batches is not QAT.batches
    batches = method.batches(decoder(), None if data_free else TEXT, 5, 9, torch.Generator().manual_seed(0))
    for _ in range(3):
        batch = next(batches)
        assert batch.shape == (5, 10) and batch.dtype == torch.int64
        assert batch.min() >= 0 and batch.max() < VOCABULARY
    if not data_free:
        with pytest.raises(ValueError, match="text=None"):
            method.batches(decoder(), None, 5, 9, torch.Generator())


def test_configuration_is_keyword_only_and_frozen(method):
    assert (
        dataclasses.is_dataclass(method)
        and type(method)(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)}) == method
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bits = 3


# What the protocol brings


def test_modules_are_exchanged_without_copying_what_they_replace(generator):
    """Oracle: by hand; what is replaced twice in a model is replaced in both places."""
    inner = nn.Linear(3, 3)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    new = nn.Identity()
    copied = exchanged(model, {inner: new})
    assert copied[0] is new and copied[2] is new and model[0] is inner
    assert not list(copied.parameters())


def test_the_loss_by_hand():
    """Oracle: by hand: uniform logits over 4 tokens, in a tensor or in an object."""
    flat = nn.Sequential(nn.Embedding(4, 4))
    nn.init.zeros_(flat[0].weight)
    assert STEQAT().loss(flat, flat, torch.tensor([[0, 1, 2]])).exp().item() == pytest.approx(4)
    assert logits_of(flat, torch.tensor([[0, 1]])).shape == (1, 2, 4)
