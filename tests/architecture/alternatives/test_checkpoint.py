"""Reading a folder in Hugging Face's layout: what comes back, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from refimpl.architecture.alternatives.checkpoint import read_checkpoint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Toy"], "act": "silu", "size": 3}))
    save_file({"a.b.weight": torch.ones(3), "a.c": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


def read(folder, plain=None):
    return read_checkpoint(folder, "Toy", plain or {"act": ("silu",)}, {"a.b.": "x.", "a.": ""})


def test_settings_and_renamed_tensors(folder):
    """Oracle: what was written; of two starts that match, the first counts."""
    given, tensors = read(folder)
    assert given["size"] == 3
    assert {name: value.tolist() for name, value in tensors.items()} == {"x.weight": [1.0] * 3, "c": [0.0] * 2}


def test_shards(folder):
    """Oracle: the same tensors from two files and their index."""
    (folder / "model.safetensors").unlink()
    save_file({"a.b.weight": torch.ones(3)}, folder / "one.safetensors")
    save_file({"a.c": torch.zeros(2)}, folder / "two.safetensors")
    where = {"a.b.weight": "one.safetensors", "a.c": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert set(read(folder)[1]) == {"x.weight", "c"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Other"]}, r"architectures \['Other'\]; supported: \['Toy'\]"),
        ({}, "architectures None"),
        ({"architectures": ["Toy"], "act": "relu"}, "act='relu' is not supported"),
        ({"architectures": ["Toy"], "quantization_config": {"bits": 4}}, "quantization_config"),
        ([1], "is no config"),
    ],
)
def test_what_is_not_supported_is_refused(folder, config, message):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_missing_and_broken_files(folder):
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="safetensors"):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="Hugging Face"):
        read(folder)
