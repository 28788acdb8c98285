"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Weights are read and written as safetensors only: a pickle (`adapter_model.bin`) can run code when it is opened.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # what PEFT's wrapper puts before a name of the base model
IDLE = {  # fields that change no output of a trained adapter, or only say where others acted
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core"),
    "qalora_group_size",
}


def write_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter; files that stand there are replaced.

    Args:
        folder: made if it is not there.
        config: fields of PEFT's configuration class, with `peft_type`.
        tensors: by name below the base model, such as `layers.0.q_proj.lora_A.weight`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(
    folder: str | Path, peft_type: str, fields: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter, as `write_adapter` takes them.

    Args:
        folder: what `write_adapter` or PEFT's `save_pretrained` wrote.
        peft_type: the kind that the caller reads, such as `LORA`.
        fields: configuration fields that the caller obeys. Another one that is set is an error, unless it is idle.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the weights are a pickle, a file is broken, or the adapter asks for more than the caller obeys.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run code when it is opened; where you trust it, load it with "
            f"PEFT and save it again, as {WEIGHTS}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is not there; an adapter is {CONFIG} and {WEIGHTS}")
    try:
        config, tensors = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no whole adapter: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        raise ValueError(f"{folder / CONFIG} must say peft_type={peft_type!r}; it says {str(config)[:80]}")
    asked = {
        field: value
        for field, value in config.items()
        if field not in IDLE and field not in fields and value not in (None, False, "none", {}, [])
    }
    if asked:
        raise ValueError(
            f"{folder} asks for more than plain {peft_type}: {asked}; merge it with PEFT and load the result"
        )
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def check_fit(folder: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check an adapter's tensors against the names and shapes that a model asks for.

    Raises:
        ValueError: one is missing, is not asked for, or has another shape; or there are none.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(expected.keys() | found) if found.get(name) != expected.get(name)]
    if wrong or not found:
        name = wrong[0] if wrong else "every factor"
        got, ask = found.get(name, "missing"), expected.get(name, "no such tensor")
        raise ValueError(f"{folder}: {name} is {got}, the model asks for {ask}; was it trained on another model?")
