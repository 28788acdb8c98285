"""Adapters on disk: what is written is read, and nothing else is."""

import json
import pickle

import pytest
import torch

from refimpl.finetuning.peft.adapter_files import CONFIG, WEIGHTS, check_fit, read_adapter, write_adapter

TENSORS = {"layer.lora_A.weight": torch.arange(6.0).view(2, 3), "layer.lora_B.weight": torch.zeros(4, 2).bfloat16()}


def read(folder):
    return read_adapter(folder, "LORA", ["r"])


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path, {"peft_type": "LORA", "r": 2, "bias": "none"}, TENSORS)
    return tmp_path


def test_what_is_written_is_read(folder):
    """Oracle: the values written; names stand in the file as PEFT has them."""
    config, tensors = read(folder)
    assert config == {"peft_type": "LORA", "r": 2, "bias": "none"}
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items()
    )
    assert b"base_model.model.layer.lora_A.weight" in (folder / WEIGHTS).read_bytes()


def test_a_tensor_that_is_a_view_is_written_alone(tmp_path):
    """Oracle: its size; a view's storage can be the whole model."""
    write_adapter(tmp_path, {"peft_type": "LORA"}, {"a": torch.zeros(1000, 1000)[:, :2].T})
    assert (tmp_path / WEIGHTS).stat().st_size < 2 * 1000 * 4 + 500


class Trap:
    """Fails the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was opened",)


def test_a_pickle_is_never_opened(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, which can run code"):
        read(folder)


def test_a_pickle_beside_the_weights_is_ignored(folder):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    assert read(folder)[0]["r"] == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is not there"):
        read(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x02"])
def test_a_broken_file_is_no_traceback_of_a_library(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="holds no whole adapter"):
        read(folder)


@pytest.mark.parametrize("config", [[], {}, {"peft_type": "IA3"}, 3])
def test_another_kind_is_refused(folder, config):
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must say peft_type='LORA'; it says"):
        read(folder)


def test_a_field_that_is_not_obeyed_is_refused(folder):
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "use_dora": True, "alpha_pattern": {}, "task_type": "X"})
    )
    with pytest.raises(ValueError, match=r"asks for more than plain LORA: \{'use_dora': True\}"):
        read(folder)


def test_what_fits_is_by_name_and_shape():
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_fit("x", TENSORS, shapes)
    for expected, message in [
        (shapes | {"layer.lora_A.weight": (2, 4)}, r"layer.lora_A.weight is \(2, 3\), the model asks for \(2, 4\)"),
        (shapes | {"other": (1,)}, r"other is missing, the model asks for \(1,\)"),
        ({"layer.lora_A.weight": (2, 3)}, r"layer.lora_B.weight is \(4, 2\), the model asks for no such tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_fit("x", TENSORS, expected)
    with pytest.raises(ValueError, match="every factor is missing"):
        check_fit("x", {}, {})
