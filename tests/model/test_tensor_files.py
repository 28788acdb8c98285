"""The files of a checkpoint; what is wrong with one is told by its name. More of it in `test_load.py`, on whole checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file

from refimpl.model.tensor_files import INDEX, SINGLE, headers, opened, some, tensor_files


@pytest.fixture
def shards(tmp_path):
    """Two shards of one tensor each, and their index."""
    for name, tensor in (("a", torch.ones(2, 3)), ("b", torch.ones(5, dtype=torch.bfloat16))):
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_a_single_file_needs_no_index(shards):
    save_file({"c": torch.ones(1)}, shards / SINGLE)
    assert tensor_files(shards) == {shards / SINGLE: None}


def test_shards_come_with_what_the_index_says_of_them(shards):
    assert tensor_files(shards) == {shards / "a.safetensors": {"a"}, shards / "b.safetensors": {"b"}}


def test_headers_are_shapes_and_dtypes(shards):
    """Oracle: the tensors that were written."""
    assert headers(shards / "a.safetensors", {"a"}) == {"a": ((2, 3), "F32")}
    assert headers(shards / "b.safetensors", None) == {"b": ((5,), "BF16")}
    with pytest.raises(ValueError, match=r"a\.safetensors: holds other tensors than .*different: a; b"):
        headers(shards / "a.safetensors", {"b"})


def test_an_index_that_points_outside_is_refused(shards):
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="must be the name of a file beside it"):
        tensor_files(shards)


def test_a_file_that_is_cut_off_is_told_by_name(shards):
    file = shards / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a\.safetensors: is no safetensors file, or is cut off"), opened(file):
        pass


def test_many_names_are_shortened():
    assert some(["a", "b"]) == "a; b"
    assert some(list("abcdefghij")) == "a; b; c; d; e; f; g; h; and 2 more"
