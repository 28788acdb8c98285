"""The compression arena, on a small random model in place of the testbed's."""

import pytest
import torch

from refimpl import testbed
from refimpl.arena import compression as arena
from refimpl.arena.protocol import Conditions
from refimpl.compression.low_rank.svd import SVD
from refimpl.compression.pruning.structured.shortgpt import ShortGPT
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.config import Config
from refimpl.model.load import save
from refimpl.model.model import Decoder, initialize_
from refimpl.testbed.tokenizer import tokenizer

SHAPE = {"vocabulary": 2048, "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
PER_BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # weights of linear layers


def small_model(dtype=torch.bfloat16):
    config = Config(**SHAPE, tied_embeddings=True)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.1).to(dtype).eval()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A random model, short windows, one task."""
    monkeypatch.setattr(
        testbed, "subject", lambda path, device, dtype: testbed.Subject(small_model(dtype).to(device), tokenizer())
    )
    monkeypatch.setattr(arena, "TASKS", ("few_shot",))


def conditions(**options):
    return Conditions(generator=torch.Generator().manual_seed(3), quick=True, **options)


def test_figures_are_those_announced_and_repeat():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    runs = [
        lambda: arena.baseline(conditions()),
        lambda: arena.measure(GPTQ, {"bits": 3, "group_size": 16}, conditions()),
    ]
    for run in runs:
        first, second = run(), run()
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]


def test_bytes_by_hand():
    """Oracle: arithmetic. Two bytes a parameter in 16 bit; 4-bit codes in groups of 32 take 4.625 bits a weight; half of the
    blocks take half of the bytes."""
    whole = 2 * (2048 * 32 + 4 * (PER_BLOCK + 64) + 32)
    base = arena.baseline(conditions())
    assert (base["bytes"], base["layer_bytes"], base["compression"]) == (whole, 2 * 4 * PER_BLOCK, 1)
    rtn = arena.measure(RTN, {"bits": 4, "group_size": 32}, conditions())
    assert rtn["layer_bytes"] == 4 * PER_BLOCK * 4.625 / 8
    assert rtn["bytes"] == whole - base["layer_bytes"] + rtn["layer_bytes"]
    assert rtn["compression"] == whole / rtn["bytes"]
    short = arena.measure(ShortGPT, {"sparsity": 0.5}, conditions())
    assert short["layer_bytes"] == base["layer_bytes"] / 2
    assert short["bytes"] == whole - 2 * 2 * (PER_BLOCK + 64)
    svd = arena.measure(SVD, {"ratio": 0.6}, conditions())
    assert 0.35 * base["layer_bytes"] < svd["layer_bytes"] <= 0.4 * base["layer_bytes"]


def test_the_output_layer_is_no_part_of_the_layers(monkeypatch):
    """Oracle: arithmetic. An output layer of its own adds to the whole only."""
    model = initialize_(Decoder(Config(**SHAPE)), torch.Generator().manual_seed(0)).bfloat16().eval()
    monkeypatch.setattr(testbed, "subject", lambda path, device, dtype: testbed.Subject(model, tokenizer()))
    base = arena.baseline(conditions())
    assert base["layer_bytes"] == 2 * 4 * PER_BLOCK
    assert base["bytes"] == 2 * (2 * 2048 * 32 + 4 * (PER_BLOCK + 64) + 32)


def test_more_compression_is_further_from_the_model():
    """Oracle: perplexity of the model itself; 8 bits hardly move it, 1 bit and one block do."""
    base = arena.baseline(conditions())["perplexity"]
    near = arena.measure(RTN, {"bits": 8, "group_size": 32}, conditions())["perplexity"]
    assert abs(near / base - 1) < 0.02
    far = [arena.measure(RTN, {"bits": 1}, conditions()), arena.measure(ShortGPT, {"sparsity": 0.75}, conditions())]
    assert all(abs(figures["perplexity"] / base - 1) > abs(near / base - 1) for figures in far)


def test_methods_meet_the_same_substrate_and_leave_it_as_it_was():
    """Oracle: a second draw from the seed; calibration is training text, what is measured is not."""
    first, second = arena.substrate(conditions()), arena.substrate(conditions())
    assert all(torch.equal(a, b) for a, b in zip(first.calibration, second.calibration, strict=True))
    assert torch.equal(first.held_out, second.held_out) and first.samples == second.samples
    assert first.calibration[0].shape == (8, arena.LENGTH)
    train = testbed.corpus.tokens("train", arena.TEXT)
    row = first.calibration[0][0]
    starts = (train == row[0]).nonzero().flatten()
    assert any(torch.equal(train[start : start + arena.LENGTH], row) for start in starts)
    assert not torch.equal(first.held_out[:200], train[:200])


def test_dense_products_equal_those_of_the_compressed_model(generator):
    """Oracle: the compressed model before its weights are unpacked; factors stay factors."""
    from refimpl.compression.protocol import CompressedLinear, compress

    tokens = torch.randint(0, 2048, (2, 9), generator=generator)
    for method, left in ((RTN(bits=3), 0), (SVD(ratio=0.4), 28)):
        small = compress(small_model(), method)
        expected = small(tokens)
        plain = arena._unpacked(small)
        assert torch.equal(plain(tokens), expected)
        assert sum(isinstance(layer, CompressedLinear) for layer in plain.modules()) == left


def test_a_model_of_the_users_takes_the_testbeds_place(tmp_path, monkeypatch):
    """Oracle: the same model through the testbed's door; text is cut into the same tokens, less the ends of documents."""
    monkeypatch.undo()
    monkeypatch.setattr(arena, "TASKS", ("few_shot",))
    save(small_model(), tmp_path)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    figures = arena.measure(RTN, {"bits": 4, "group_size": 32}, conditions(model=tmp_path))
    assert figures["layer_bytes"] == 4 * PER_BLOCK * 4.625 / 8
    with pytest.raises(FileNotFoundError):
        arena.measure(RTN, {"bits": 4}, conditions(model=tmp_path / "none"))
