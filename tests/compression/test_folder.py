"""Compressed models in folders: written and read, made block by block, and never half."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from refimpl.compression import folder
from refimpl.compression.folder import compress_folder, load_compressed, save_compressed
from refimpl.compression.low_rank.svd import SVD
from refimpl.compression.protocol import CompressedWeight, compress
from refimpl.compression.pruning.unstructured.wanda import Wanda
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.model.config import Config, Rope
from refimpl.model.generate import generate
from refimpl.model.load import load, save
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import Rotary, Rotation
from tests.compression import conftest
from tests.compression.conftest import decoder_with_biases as decoder
from tools.peers import peak_bytes


def test_a_folder_gives_back_the_model(tokens, logits, tmp_path):
    """Oracle: the model in memory, bit by bit; some layers stay as they are, and their tensors too."""
    model = decoder()
    for method in (RTN(bits=3, group_size=12), SVD(ratio=0.4)):
        small = compress(model, method, target=["*q_proj", "*down_proj", "layers.1.*"])
        where = tmp_path / type(method).__name__
        save_compressed(small, where)
        again = load_compressed(where)
        assert torch.equal(logits(again, tokens), logits(small, tokens))
        assert not torch.equal(logits(again, tokens), logits(model, tokens))
        assert sum(b.nbytes for b in again.buffers()) == sum(b.nbytes for b in small.buffers())
        assert not again.training


@pytest.fixture
def checkpoint(tmp_path):
    """A sharded checkpoint of six blocks, with biases and without a window, and its model."""
    config = Config(vocabulary=61, d_model=32, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, qkv_bias=True)
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).eval()
    save(model, tmp_path / "model", shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model", model


@pytest.mark.parametrize(
    "method", [GPTQ(bits=3, group_size=16), RTN(bits=2, group_size=16), Wanda()], ids=["gptq", "rtn", "wanda"]
)
def test_block_by_block_gives_the_same_weights(method, checkpoint, tokens, logits, tmp_path):
    """Oracle: `compress` on the model in memory, on two batches of different sizes; folders say the same of both."""
    source, model = checkpoint
    batches = [tokens, tokens[:1, :7]]
    seen = []
    compress_folder(source, tmp_path / "small", method, batches, skip=["lm_head", "layers.2.*"], done=seen.append)
    small = load_compressed(tmp_path / "small")
    expected = compress(model, method, batches, skip=["lm_head", "layers.2.*"])
    assert small.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in small.state_dict().items())
    assert torch.equal(logits(small, tokens), logits(expected, tokens))
    assert len(seen) == 5 * 7 and not any(name.startswith("layers.2.") for name in seen)
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"
    save_compressed(expected, tmp_path / "whole")
    for name in ("compressed.json", "config.json", "ends.safetensors", "block-00001.safetensors"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_blocks_are_held_and_not_the_model(tmp_path):
    """Oracle: bytes that torch allocates, with 4 and with 12 blocks of 300 kB; `compress` holds a copy of them all."""
    peaks = []
    for n in (4, 12):
        config = Config(vocabulary=61, d_model=96, n_layers=n, n_heads=4, n_kv_heads=4, head_dim=24, d_ff=130)
        model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        save(model, tmp_path / f"{n}", shard_bytes=50_000)
        batches = [torch.arange(40).view(2, 20)]
        streamed = peak_bytes(
            lambda n=n, batches=batches: compress_folder(tmp_path / f"{n}", tmp_path / f"{n}s", RTN(), batches)
        )
        peaks.append((streamed, peak_bytes(lambda model=model, batches=batches: compress(model, RTN(), batches))))
    block = sum(p.nbytes for p in model.layers[0].parameters())
    assert peaks[0][0] < 2 * block and peaks[1][0] < 2 * block
    assert peaks[1][1] > 12 * block  # negative control


def test_the_source_is_left_and_nothing_half_is_written(checkpoint, tmp_path, monkeypatch):
    """Oracle: the disk, which is full when the third file is written."""
    source, _ = checkpoint
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    written = []

    def full(tensors, path, *rest):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, *rest)

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(OSError, match=r"small: can't be written, and nothing is left of it: .*No space left on device"):
        compress_folder(source, tmp_path / "small", RTN())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert torch.isfinite(load(source)(torch.arange(5)[None])).all()


def test_what_is_there_is_not_overwritten(checkpoint, tmp_path):
    source, model = checkpoint
    with pytest.raises(FileExistsError, match="model: is there already"):
        compress_folder(source, source, RTN())
    with pytest.raises(FileExistsError, match="is there already"):
        save_compressed(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ["encoder.*"]}, "matches no linear layer"),
        ({"skip": []}, "layer 'lm_head' stands outside of the blocks: leave it out by `skip`"),
        ({"calibration": torch.arange(4)[None]}, r"calibration is one Tensor .* put it in \[ \]"),
    ],
)
def test_bad_arguments_are_refused(options, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress_folder(checkpoint[0], tmp_path / "small", RTN(), **options)
    assert not (tmp_path / "small").exists()


def test_calibration_that_makes_nan_is_told(checkpoint, tmp_path):
    source, model = checkpoint
    with torch.no_grad():
        model.embedding.weight[3] = float("inf")
    save(model, source)
    with pytest.raises(
        ValueError, match=r"makes NaN or infinity in the inputs of layer 'layers\.0\.attention\.q_proj'"
    ):
        compress_folder(source, tmp_path / "small", GPTQ(), [torch.tensor([[3, 3]])])
    assert not (tmp_path / "small").exists()


def test_a_description_names_no_foreign_class(tmp_path):
    """Oracle: a description that names another class, and a weight whose class is the test's own."""
    save_compressed(compress(decoder(), RTN()), tmp_path / "small")
    file = tmp_path / "small" / "compressed.json"
    about = json.loads(file.read_text())
    about["layers"][1]["modules"]["feed_forward"]["class"] = "os:system"
    file.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"compressed\.json: 'layers\.1\.feed_forward' is 'os:system', which is no module"
    ):
        load_compressed(tmp_path / "small")

    class Own(CompressedWeight):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("stored", weight)

        def dense(self):
            return self.stored

    with pytest.raises(ValueError, match=r"'layers\.0\.attention\.q_proj\.compressed' is a .*Own: only classes of"):
        save_compressed(compress(decoder(), lambda weight, inputs: Own(weight)), tmp_path / "own")
    assert not (tmp_path / "own").exists()


def replaced(**parts):
    """A decoder some of whose parts are others."""
    model = decoder()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def hooked():
    model = decoder()
    model.layers[2].register_forward_hook(lambda *_: None)
    return model


def hooked_as_a_whole():
    model = decoder()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def shortened():
    model = decoder()
    del model.layers[3]
    return model


def attending():
    model = decoder()
    model.layers[1].attention.attend = lambda q, k, v, **_: v
    return model


def sharing():
    model = decoder()
    model.layers[1].attention.q_proj.weight = model.layers[0].attention.q_proj.weight
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (conftest.llama, r"a LlamaForCausalLM can't be written: load its checkpoint by refimpl\.model\.load"),
        (lambda: replaced(rotary=Rotation(torch.ones(4))), "rotary=.* is not the rotation of the model's config"),
        (lambda: replaced(rotary=Rotary(dataclasses.replace(decoder().config, rope=Rope(theta=5.0)))), "rotary=.* is not the"),
        (lambda: replaced(score_bias=lambda q, k: q - k), "score_bias is replaced"),
        (lambda: replaced(draft=nn.Linear(2, 2)), r"the decoder holds \['draft'\], or lacks them"),
        (lambda: replaced(depth=3), r"the decoder holds \['depth'\], or lacks them"),
        (hooked, r"layers\.2 has forward_hooks, which can't be written down"),
        (hooked_as_a_whole, "the decoder has forward_pre_hooks, which can't be written down"),
        (shortened, r"3 layers can't be written, where config\.n_layers=4"),
        (attending, r"layers\.1\.attention\.attend is a function, which can't be written down"),
        (sharing, r"'layers\.1\.attention\.q_proj\.weight' is 'layers\.0\.attention\.q_proj\.weight' too"),
        (lambda: conftest.decoder(), "sliding_window="),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(build, message, tmp_path, monkeypatch):
    """Oracle: the disk, to which nothing is written."""
    monkeypatch.setattr(folder, "_fresh", None)
    with pytest.raises(ValueError, match=message):
        save_compressed(build(), tmp_path / "small")


def test_what_does_not_fit_its_description_is_refused(tmp_path):
    save_compressed(compress(decoder(), RTN()), tmp_path / "small")
    file = tmp_path / "small" / "compressed.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"layers": about["layers"][:3]}))
    with pytest.raises(ValueError, match=r"compressed\.json: must describe embedding, norm, lm_head and 4 layers"):
        load_compressed(tmp_path / "small")
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"compressed\.json: must describe"):
        load_compressed(tmp_path / "small")
    file.write_text(json.dumps({name: value for name, value in about.items() if name != "norm"}))
    with pytest.raises(ValueError, match=r"compressed\.json: must describe embedding, norm, lm_head and 4 layers"):
        load_compressed(tmp_path / "small")
    del about["layers"][3]["modules"]["attention"]
    file.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"block-00003\.safetensors: holds tensor 'layers\.3\.attention\..*does not describe"
    ):
        load_compressed(tmp_path / "small")


def test_the_guides_example_runs(tmp_path, capsys):
    """Oracle: the page itself, on a checkpoint of random weights: 64 words, those that the folder's model goes on with."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "own_model.md").read_text(encoding="utf-8")
    section = page.partition("## Larger than memory")[2].partition("\n## ")[0]
    code = section.partition("```python\n")[2].partition("```")[0]
    words = [f"w{i}" for i in range(61)]
    model = decoder()
    save(model, tmp_path / "checkpoint")
    tokens = Tokenizer(WordLevel(dict(zip(words, range(61), strict=True)), unk_token="w0"))
    tokens.pre_tokenizer = Whitespace()
    tokens.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(50)))
    exec(code.replace("path/to", str(tmp_path)), {})
    said = capsys.readouterr().out.split()
    assert len(said) == 64 and set(said) <= set(words)
    again = load_compressed(tmp_path / "small")
    prompt = torch.tensor([tokens.encode("Once upon a time").ids])
    assert said == tokens.decode(generate(again, prompt, 64)[0].tolist()).split()
    assert sum(t.nbytes for t in again.state_dict().values()) < sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("name", ["ends.safetensors", "block-00002.safetensors", "compressed.json"])
def test_a_missing_file_is_named(name, tmp_path):
    save_compressed(compress(decoder(), RTN()), tmp_path / "small")
    (tmp_path / "small" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_compressed(tmp_path / "small")
