r"""Checkpoints of sequence-mixer models in Hugging Face's layout: config.json and safetensors.

Source: the layout that transformers 5.23.0 writes (`save_pretrained`).

Differs from transformers: a setting or an architecture that is not supported is an error.

Not here: what the settings and the tensors mean (each method's `load`), pickles, quantized checkpoints.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from refimpl.model.tensor_files import headers, opened, tensor_files


def read_checkpoint(
    path: str | Path, architecture: str, plain: Mapping[str, tuple[Any, ...]], renames: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors in a folder.

    Args:
        path: folder with config.json, and model.safetensors or its shards and their index.
        architecture: the entry of `architectures` that is supported.
        plain: settings that would change the computation, and their supported values.
        renames: starts of tensors' names, and what stands for them here; the first that matches counts.

    Returns:
        config.json as it stands, and the tensors by their new names.

    Raises:
        FileNotFoundError: no config.json, no weights, or a shard is missing.
        ValueError: not JSON, another architecture, an unsupported setting, pickles only, a broken file.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a folder in Hugging Face's layout is needed")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        found = given.get("architectures")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: is no config: {error}") from error
    if found != [architecture]:
        raise ValueError(f"{file}: architectures {found}; supported: [{architecture!r}]")
    for name, allowed in {**plain, "quantization_config": (None,)}.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{file}: {name}={given[name]!r} is not supported, only {allowed}")
    tensors = {}
    for weights, names in tensor_files(folder).items():
        with opened(weights) as shard:
            for name in headers(weights, names):
                tensors[_renamed(name, renames)] = shard.get_tensor(name)
    return given, tensors


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    start = next((start for start in renames if name.startswith(start)), "")
    return renames.get(start, "") + name.removeprefix(start)
