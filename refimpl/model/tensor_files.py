"""The safetensors files of a checkpoint: one, or shards and their index. No pickle is ever opened."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor_files(folder: Path) -> dict[Path, set[str] | None]:
    """Files of weights, and the tensors that the index says are in each; None where there is no index.

    Raises:
        FileNotFoundError: neither file nor index, or a shard is missing.
        ValueError: there are pickles only, or the index is none.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: weights are pickles ({some(pickles)}), which run code when they are read; "
                "convert them to safetensors with transformers' save_pretrained, where you trust them"
            )
        raise FileNotFoundError(f"{folder}: has neither {SINGLE} nor {INDEX}")
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        files: dict[Path, set[str] | None] = {}
        for tensor, name in where:
            if Path(name).name != name:
                raise ValueError(f"{name!r} must be the name of a file beside it")
            cast(set[str], files.setdefault(folder / name, set())).add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: is no index of shards: {error}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: shards that {INDEX} names are missing: {some(missing)}")
    return files


def headers(file: Path, names: set[str] | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors in a file; no tensor is read.

    Raises:
        ValueError: it is no safetensors file, or holds other tensors than the index says.
    """
    with opened(file) as weights:
        keys = set(weights.keys())
        if names is not None and names != keys:
            raise ValueError(f"{file}: holds other tensors than {INDEX} says; different: {some(sorted(names ^ keys))}")
        slices = {name: weights.get_slice(name) for name in keys}
        return {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}


@contextmanager
def opened(file: Path, device: torch.device | str | None = None) -> Iterator[Any]:
    """A safetensors file, whose faults are told with its name."""
    try:
        with safe_open(file, framework="pt", device=str(device or "cpu")) as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file}: is no safetensors file, or is cut off: {error}") from error


def some(names: list[str], n: int = 8) -> str:
    """The first n of many names, and how many more there are."""
    return "; ".join(names[:n]) + (f"; and {len(names) - n} more" if len(names) > n else "")
