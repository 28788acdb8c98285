"""Checkpoints: single and sharded, there and back, and every way in which a folder can be broken."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from refimpl.model.config import Config
from refimpl.model.load import load, save, tokenizer
from refimpl.model.model import Decoder, initialize_
from tests.model.conftest import KINDS

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def rewrite(folder, change, name="model.safetensors"):
    """Change the tensors of a file."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_shards_equal_the_single_file(checkpoint, kind):
    """Oracle: transformers' own tensors, name by name; nothing is left on `meta`, all is trainable."""
    peer, folder = checkpoint(kind, shards="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, theirs = load(folder), peer.state_dict()
    assert not model.training
    for name, parameter in model.named_parameters():
        other = name.replace("attention.", "self_attn.", 1).replace("feed_forward.", "mlp.", 1)
        other = other.replace("attention_norm", "input_layernorm").replace(
            "feed_forward_norm", "post_attention_layernorm"
        )
        other = "model." + other.replace("embedding", "embed_tokens") if not name.startswith("lm_head") else name
        assert torch.equal(parameter, theirs[other]), name
        assert parameter.requires_grad
    assert (model.lm_head is None) == (kind == "llama-tied")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("llama-default", "mistral-full")])
@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 20_000])
def test_transformers_reads_what_is_saved(checkpoint, tmp_path, tokens, kind, shard_bytes):
    """Peer: transformers 5.23.0: logits of the model that it loads from our folder; and our own round trip."""
    _, folder = checkpoint(kind)
    model = load(folder)
    save(model, tmp_path / "saved", shard_bytes)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_bytes < 10**6)
    again = load(tmp_path / "saved")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, **CLOSE)


def test_saving_over_what_is_loaded(checkpoint, tokens):
    """Oracle: the logits before. A loaded model may be mapped to its file, and old shards must not stay."""
    _, folder = checkpoint("llama", shards="20KB")
    model = load(folder)
    with torch.no_grad():
        before = model(tokens)
        save(model, folder)
        assert torch.equal(model(tokens), before)
        assert sorted(file.name for file in folder.glob("model*")) == ["model.safetensors"]
        assert torch.equal(load(folder)(tokens), before)


def test_dtype_and_device(checkpoint, device):
    """Oracle: as stored, unless told otherwise."""
    peer, folder = checkpoint()
    assert load(folder, device=device).embedding.weight.device.type == device.type
    assert {p.dtype for p in load(folder, dtype=torch.float64).parameters()} == {torch.float64}
    peer.bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load(folder).parameters()} == {torch.bfloat16}
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    assert {p.dtype for p in load(folder).parameters()} == {torch.bfloat16}


def test_what_old_versions_wrote_beside_the_weights(checkpoint, tokens):
    """Oracle: the same logits; a head that repeats the tied embedding, and frequencies that the config says too."""
    _, folder = checkpoint("llama-tied")
    with torch.no_grad():
        before = load(folder)(tokens)
        rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        assert torch.equal(load(folder)(tokens), before)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding"):
        load(folder)


def test_all_faults_of_tensors_are_told_at_once(checkpoint):
    _, folder = checkpoint()

    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 40)
        tensors["lm_head.weight"] = torch.zeros(61, 32, dtype=torch.int8)

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load(folder)
    for fault in (
        "model.norm.weight is missing",
        "model.layers.0.self_attn.q_proj.bias (in model.safetensors) is unexpected",
        "model.layers.1.mlp.up_proj.weight (in model.safetensors) has shape [32, 40], config.json says [40, 32]",
        "lm_head.weight (in model.safetensors) is I8",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", None])
def test_a_file_that_is_cut_off_or_foreign(checkpoint, content):
    _, folder = checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors: is no safetensors file, or is cut off"):
        load(folder)


def test_pickles_are_refused(checkpoint):
    _, folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model\.bin\), which run code"):
        load(folder)


def test_missing_files(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path / "nowhere")
    _, folder = checkpoint("llama", shards="20KB")
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_an_index_that_lies(checkpoint):
    _, folder = checkpoint("llama", shards="20KB")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    first, last = sorted(found["weight_map"].values())[0], sorted(found["weight_map"].values())[-1]
    name = next(tensor for tensor, file in found["weight_map"].items() if file == first)
    for file, message in {
        last: "holds other tensors than",
        "../other.safetensors": "must be the name of a file",
    }.items():
        index.write_text(json.dumps({"weight_map": found["weight_map"] | {name: file}}))
        with pytest.raises(ValueError, match=message):
            load(folder)
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: is no index"):
            load(folder)


def test_only_the_plain_decoder_is_saved(tmp_path):
    config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    model = initialize_(Decoder(config))
    model.layers[1].feed_forward = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def words(folder, n):
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0")).save(str(folder / "tokenizer.json"))


def test_tokenizer(checkpoint):
    """Oracle: `tokenizers`; a token that the model has no row for is an error, also if it was added."""
    _, folder = checkpoint()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        tokenizer(folder)
    words(folder, 61)
    found = tokenizer(folder)
    assert found.encode("w7").ids == [7]
    assert found.decode([60]) == "w60"
    found.add_tokens(["more"])
    found.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="token 'more' is number 61, the model's vocabulary ends at 60"):
        tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        tokenizer(folder)


@pytest.mark.parametrize("first", ["w1", {"content": "w1", "lstrip": False}])
def test_a_tokenizer_whose_texts_begin_otherwise_is_another_models(checkpoint, first):
    """Oracle: by hand: `w1` is number 1 here. A model, or a tokenizer, that names no first token says nothing."""
    _, folder = checkpoint("llama", bos_token_id=1)
    words(folder, 61)
    more = folder / "tokenizer_config.json"
    for said in (None, {"bos_token": first}, {"bos_token": None}):
        if said is not None:
            more.write_text(json.dumps(said))
        assert tokenizer(folder).token_to_id("w1") == 1
    for other, number in (("w2", 2), ("w99", None)):
        more.write_text(json.dumps({"bos_token": other}))
        with pytest.raises(
            ValueError, match=f"begin with '{other}', number {number}, and by config.json with number 1"
        ):
            tokenizer(folder)
    more.write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is not JSON"):
        tokenizer(folder)
