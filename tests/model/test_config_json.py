"""config.json: read as transformers reads it, in the old layout and the new; what is not supported is named."""

import json

import pytest
import transformers

from refimpl.model.config import Config, Rope
from refimpl.model.config_json import ARCHITECTURES, config_json, read_config
from tests.model.conftest import KINDS, ROPES, SIZES

PLAIN = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps(PLAIN | fields))
        return read_config(tmp_path)

    return write


def test_every_field_by_hand(read):
    """Oracle: by hand."""
    fields = {
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-5,
        "rope_theta": 7.0,
        "tie_word_embeddings": True,
    }
    assert read(architectures=["Qwen2ForCausalLM"], max_position_embeddings=99, **fields) == Config(
        vocabulary=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=40, norm_eps=1e-5,
        rope=Rope(theta=7.0), tied_embeddings=True, qkv_bias=True, sliding_window=(None,) * 3, max_positions=99,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_left_out_have_the_defaults_of_transformers(read, architecture):
    """Peer: transformers 5.23.0, built from the same few fields."""
    few = {"num_attention_heads": 32, "hidden_size": 64}
    ours = read(architectures=[architecture], **few)
    name = architecture.replace("ForCausalLM", "Config")
    theirs = getattr(transformers, name)(**{k: v for k, v in PLAIN.items() if k != "architectures"} | few)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.n_kv_heads, ours.head_dim, ours.norm_eps, ours.max_positions, ours.rope.theta, ours.tied_embeddings) == (
        theirs.num_key_value_heads, head_dim, theirs.rms_norm_eps, theirs.max_position_embeddings,
        theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings,
    )  # fmt: skip
    window = theirs.sliding_window if architecture != "LlamaForCausalLM" else None
    assert ours.sliding_window == (window,) * 3


@pytest.mark.parametrize("name", ROPES)
def test_old_and_new_layout_of_rope_are_one(read, name):
    """Oracle: by hand, the renamings of transformers 5."""
    new = read(rope_parameters=ROPES[name], max_position_embeddings=64)
    old = {key: value for key, value in ROPES[name].items() if key not in ("rope_theta", "rope_type")}
    old["type"] = ROPES[name]["rope_type"]
    assert read(rope_theta=ROPES[name]["rope_theta"], rope_scaling=old, max_position_embeddings=64) == new
    assert new.rope.type == ROPES[name]["rope_type"]
    assert new.rope.theta == ROPES[name]["rope_theta"]
    assert new.rope.factor == ROPES[name].get("factor", 1.0)


def test_original_context_is_the_stated_one_or_all(read):
    """Oracle: transformers' `standardize_rope_params`: beside the scaling, in it, or max_position_embeddings."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert read(rope_scaling=yarn, max_position_embeddings=64).rope.original_max_positions == 64
    yarn["original_max_position_embeddings"] = 32
    assert read(rope_scaling=yarn).rope.original_max_positions == 32
    assert read(rope_scaling=yarn, original_max_position_embeddings=16).rope.original_max_positions == 16
    del yarn["factor"]
    assert read(rope_scaling=yarn, max_position_embeddings=96).rope.factor == 3.0


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}, (4096,) * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None, "num_key_value_heads": 2}, (None,) * 3),
        ({"sliding_window": 5}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, (None, None, 5)),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, (5, 5, 5)),
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
    ],
)
def test_windows_by_layer(read, fields, windows):
    """Oracle: by hand, from transformers' configuration classes."""
    fields = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2} | fields
    assert read(**fields).sliding_window == windows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures=\['GPT2LMHeadModel'\].*LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "architectures=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: \"silu\""),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type='longrope'.*default, linear, dynamic, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section="),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one object for all layers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at least 1"),
        ({"hidden_size": "32"}, "hidden_size='32' must be an integer"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 0}, "n_layers=0 must be at least 1"),
        ({"num_key_value_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(read, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(**fields)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_layer_types_must_be_known_and_complete(read):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "use_sliding_window": True}
    with pytest.raises(ValueError, match="layer_types='chunked_attention'"):
        read(**qwen, layer_types=["chunked_attention"] * 3)
    with pytest.raises(ValueError, match="layer_types has 1 entries"):
        read(**qwen, layer_types=["full_attention"])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    for text, message in {"{": "is not JSON", "[1]": "holds list"}.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back(tmp_path, kind):
    """Oracle: round trip; `test_load` gives what is written to transformers."""
    name, fields = KINDS[kind]
    getattr(transformers, f"{name}Config")(**SIZES | fields, architectures=[f"{name}ForCausalLM"]).save_pretrained(
        tmp_path
    )
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "both"),
        ({"sliding_window": (4, 5)}, "one window"),
        ({"sliding_window": (4, None)}, "all layers or none"),
    ],
)
def test_what_no_architecture_computes_is_not_written(fields, message):
    sizes = {"vocabulary": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    with pytest.raises(ValueError, match=message):
        config_json(Config(**sizes, **fields))
