r"""Config.json of Hugging Face: read into a decoder's shape, and written.

Source: the configuration classes of transformers 5.23.0 (`llama`, `mistral`, `qwen2`, `qwen3`), whose defaults hold here
for a field that the file leaves out.

Differs from transformers: what is not supported is refused; a field that transformers does not read either is ignored.

Not here: biases of the output projection and of the feed-forward, partial rotation, rotation that differs by layer,
quantized checkpoints.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from refimpl.model.config import Config, Rope, RopeType

# Defaults of transformers 5.23.0, where they differ between the architectures; the others are those of `read_config`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128,
    },
}  # fmt: skip

# What would change the computation, and the values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}

ROPE_FIELDS = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim",
)  # fmt: skip
ROPE_NEEDS = {"linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
ROPE_OTHERS = {
    "rope_theta",
    "rope_type",
    "type",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "finetuned",
}


def read_config(path: str | Path) -> Config:
    """Shape of the model in a folder in Hugging Face's layout.

    Args:
        path: the folder, or its config.json.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON object, or says what is not supported; the message names file, field and value.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a checkpoint is a folder with config.json and *.safetensors")
    found = read_object(file)
    try:
        return _config(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds {type(found).__name__}, must be an object")
    return found


def config_json(config: Config) -> dict[str, Any]:
    """The content of config.json: the architecture of transformers that computes what this shape says.

    Raises:
        ValueError: none of those supported does.
    """
    architecture = _architecture(config)
    rope = config.rope
    found: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "rope_theta": rope.theta,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if rope.type != "default":  # the layout that versions before 5 read, and later ones convert
        scaling = {name: getattr(rope, name) for name in ROPE_FIELDS}
        scaling |= {"rope_type": rope.type, "original_max_position_embeddings": rope.original_max_positions}
        found["rope_scaling"] = {
            name: scaling[name] for name in _fields_of(rope.type) if name in scaling and scaling[name] is not None
        }
    windows = set(config.sliding_window) - {None}
    if architecture == "MistralForCausalLM":
        found["sliding_window"] = config.sliding_window[0]
    elif architecture != "LlamaForCausalLM":
        found["use_sliding_window"] = bool(windows)
        found["sliding_window"] = next(iter(windows), None)
        found["layer_types"] = ["sliding_attention" if window else "full_attention" for window in config.sliding_window]
    return found


def _config(found: Mapping[str, Any]) -> Config:
    """Config from the content of config.json."""
    architecture = next((name for name in found.get("architectures") or [] if name in ARCHITECTURES), None)
    if architecture is None:
        raise _unsupported("architectures", found.get("architectures"), ARCHITECTURES)
    for name, plain in PLAIN.items():
        if found.get(name, plain[0]) not in plain:
            raise _unsupported(name, found[name], [json.dumps(value) for value in plain])
    fields = ARCHITECTURES[architecture] | {name: value for name, value in found.items() if value is not None}
    if "sliding_window" in found:  # an explicit null is an answer
        fields["sliding_window"] = found["sliding_window"]
    n_heads, d_model = _integer(fields, "num_attention_heads"), _integer(fields, "hidden_size")
    n_layers, max_positions = _integer(fields, "num_hidden_layers"), _integer(fields, "max_position_embeddings")
    if "head_dim" not in fields and d_model % n_heads:
        raise ValueError(
            f"hidden_size={d_model} must be a multiple of num_attention_heads={n_heads}, or state head_dim"
        )
    return Config(
        vocabulary=_integer(fields, "vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_integer(fields, "num_key_value_heads", n_heads),
        head_dim=_integer(fields, "head_dim", d_model // n_heads),
        d_ff=_integer(fields, "intermediate_size"),
        norm_eps=_number(fields, "rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_windows(architecture, fields, n_layers),
        max_positions=max_positions,
    )


def _windows(architecture: str, fields: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    """Window of each layer: none in Llama, one for all in Mistral, by layer in Qwen."""
    if architecture == "LlamaForCausalLM" or fields["sliding_window"] is None:
        return (None,) * n_layers
    if architecture == "MistralForCausalLM":
        return (_integer(fields, "sliding_window"),) * n_layers
    if not fields.get("use_sliding_window", False):
        return (None,) * n_layers
    window = _integer(fields, "sliding_window")
    first = _integer(fields, "max_window_layers", 28)
    types = fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(n_layers)
    ]
    known = {"sliding_attention": window, "full_attention": None}
    for kind in types:
        if kind not in known:
            raise _unsupported("layer_types", kind, known)
    if len(types) != n_layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers={n_layers}")
    return tuple(known[kind] for kind in types)


def _rope(fields: Mapping[str, Any], max_positions: int) -> Rope:
    """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    stated = fields.get(name, {})
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise _unsupported(name, stated, ["one object for all layers"])
    kind = str(stated.get("rope_type", stated.get("type", "default")))
    if kind not in get_args(RopeType):
        raise _unsupported(f"{name}.rope_type", kind, get_args(RopeType))
    for key, value in stated.items():
        if key not in ROPE_FIELDS and key not in ROPE_OTHERS:
            raise _unsupported(f"{name}.{key}", value, sorted(_fields_of(kind)))
    if stated.get("partial_rotary_factor") not in PLAIN["partial_rotary_factor"]:
        raise _unsupported(f"{name}.partial_rotary_factor", stated["partial_rotary_factor"], ["1"])
    for key in ROPE_NEEDS.get(kind, []):
        _number(stated, key, where=f"{name}.")
    values: dict[str, Any] = {
        key: value if key == "truncate" else _number(stated, key, where=f"{name}.")
        for key in ROPE_FIELDS
        if key in _fields_of(kind) and (value := stated.get(key)) is not None
    }
    if kind in ("llama3", "yarn"):
        trained = "original_max_position_embeddings"  # beside the scaling, in it, or all
        values["original_max_positions"] = _integer(fields, trained, _integer(stated, trained, max_positions))
        if kind == "yarn":
            values.setdefault("factor", max_positions / values["original_max_positions"])
    theta = _number(stated, "rope_theta", _number(fields, "rope_theta", 10000.0), where=f"{name}.")
    return Rope(theta=theta, type=cast(RopeType, kind), **values)


def _fields_of(kind: str) -> set[str]:
    """Fields of config.json that a type of rotary positions reads."""
    if kind == "yarn":
        return {*ROPE_FIELDS, "rope_theta", "rope_type", "original_max_position_embeddings"} - set(
            ROPE_NEEDS["llama3"][1:]
        )
    original = {"original_max_position_embeddings"} if kind == "llama3" else set()
    return {"rope_theta", "rope_type", *ROPE_NEEDS.get(kind, []), *original}


def _architecture(config: Config) -> str:
    """The architecture of transformers that computes what a config says."""
    windows = set(config.sliding_window)
    if config.qk_norm and config.qkv_bias:
        raise ValueError("no supported architecture has both qk_norm and qkv_bias")
    if len(windows - {None}) > 1:
        raise ValueError(
            f"sliding_window={config.sliding_window}: config.json holds one window for all layers that have one"
        )
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.qkv_bias:
        return "Qwen2ForCausalLM"
    if windows == {None}:
        return "LlamaForCausalLM"
    if None in windows:
        raise ValueError(
            f"sliding_window={config.sliding_window}: without qkv_bias or qk_norm, all layers or none have one"
        )
    return "MistralForCausalLM"


def _integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if type(value) is not int:
        raise ValueError(f"{name}={value!r} must be an integer" if name in fields else f"{name} is missing")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float | None = None, *, where: str = "") -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float):
        raise ValueError(f"{where}{name}={value!r} must be a number" if name in fields else f"{where}{name} is missing")
    return cast(float, value)


def _unsupported(name: str, value: Any, supported: Any) -> ValueError:
    return ValueError(f"{name}={value!r} is not supported; supported: {', '.join(supported)}")
