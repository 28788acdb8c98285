"""Modules as descriptions and tensors: what is kept, what is refused, and that reading runs nothing that is named."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn

from refimpl.compression.description import described, rebuilt
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.compression.reorder import ReorderedNorm
from refimpl.model.model import RMSNorm, attend
from tests.compression.conftest import decoder


@pytest.fixture
def layer(generator):
    weight = torch.randn(6, 20, generator=generator)
    return CompressedLinear(RTN(bits=3)(weight), torch.randn(6, generator=generator))


def again(module, shared=None):
    """A module made anew from its description, after that was JSON."""
    about = json.loads(json.dumps(described(module, "here", shared or {})))
    state = {f"here.{name}": tensor for name, tensor in module.state_dict().items()}
    made = rebuilt(about, state, "here", shared or {})
    assert not state
    return made


def test_a_module_comes_back(layer, generator):
    """Oracle: the module: its class and those in it, what each holds, which tensors learn, and what it computes."""
    x = torch.randn(3, 20, generator=generator)
    norm = RMSNorm(20, 1e-7)
    norm.weight = nn.Parameter(torch.rand(20, generator=generator), requires_grad=False)
    module = ReorderedNorm(norm, torch.randperm(20, generator=generator))
    for one in (layer, module):
        other = again(one)
        assert torch.equal(other(x), one(x)) and str(other) == str(one)
        for mine, theirs in zip(one.modules(), other.modules(), strict=True):
            assert type(mine) is type(theirs)
            plain = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (mine, theirs)]
            assert plain[0] == plain[1]
        assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]
        assert other.state_dict().keys() == one.state_dict().keys()


def test_plain_values_by_hand(layer):
    """Oracle: by hand. Tuples and dtypes are told from lists and texts; what is private is kept too; what is shared is itself."""
    held = vars(layer.compressed)
    held |= {"_private": ((1, None), 2.5, True, "torch.float32"), "kind": torch.bfloat16, "turns": attend}
    made = vars(again(layer, {"attention": attend}).compressed)
    assert made["_private"] == ((1, None), 2.5, True, "torch.float32") and type(made["_private"][0]) is tuple
    assert made["kind"] is torch.bfloat16 and made["turns"] is attend and type(made["shape"]) is tuple


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([1], "list"),
        (torch.Size([2]), "Size"),
        (torch.ones(1), "Tensor"),
        (nn.ReLU, "type"),
        (attend, "function"),
        (torch.int8, "dtype"),
    ],
)
def test_other_values_are_refused(value, name, layer):
    vars(layer.compressed)["extra"] = value
    with pytest.raises(ValueError, match=rf"up\.compressed\.extra is a {name}, which can't be written down"):
        described(layer, "up", {})


def test_hooks_and_buffers_that_are_not_saved_are_refused(layer):
    hooked, unsaved = copy.deepcopy(layer), copy.deepcopy(layer)
    hooked.compressed.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"up\.compressed has forward_hooks, which can't be written down"):
        described(hooked, "up", {})
    unsaved.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match="up has non_persistent_buffers_set, which can't be written down"):
        described(unsaved, "up", {})


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.modules.activation:ReLU",
        "refimpl.compression.protocol:compress",  # no class
        "refimpl.compression.protocol:LayerMethod",  # no module
        "refimpl.compression.protocol:nn",
        "refimpl.compression.folder:Decoder",  # imported there
        "refimpl.compression.nowhere:Thing",
        "refimpl.model.model:Decoder",
        "os:system",
        "",
    ],
)
def test_no_other_class_is_looked_up(name, layer, monkeypatch):
    """Oracle: what is imported meanwhile: modules of this family, and no others."""
    imported, load = [], importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda module: (imported.append(module), load(module))[1])
    about = described(layer, "up", {})
    about["modules"]["compressed"]["class"] = name
    state = {f"up.{key}": tensor for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"'up\.compressed' is '{name}', which is no module of refimpl\.compression"):
        rebuilt(about, state, "up", {})
    assert all(module.startswith("refimpl.compression.") for module in imported)


def test_other_classes_are_refused():
    for module in (nn.ReLU(), decoder(), nn.Sequential()):
        with pytest.raises(ValueError, match=r"'up' is a .*: only classes of refimpl\.compression, and those that"):
            described(module, "up", {})


def test_what_is_no_description_is_refused(layer):
    about = described(layer, "up", {})
    state = {f"up.{key}": tensor for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"tensor 'up\.compressed\.scale' is described, and missing"):
        rebuilt(about, {name: t for name, t in state.items() if name != "up.compressed.scale"}, "up", {})
    for broken in (
        {},
        [],
        about | {"attributes": 3},
        about | {"attributes": {"x": {"shared": "nothing"}}},
        about | {"buffers": {"a.b": False}},
    ):
        with pytest.raises(ValueError, match="'up' is not described as a module is"):
            rebuilt(broken, dict(state), "up", {})


def test_a_description_can_not_put_hooks_or_modules_in_place(layer):
    """Oracle: a bare module: what PyTorch keeps of a module is its own, whatever the description says of it."""
    about = described(layer, "up", {})
    about["attributes"] = {"_forward_hooks": [1], "_modules": 5, "training": False}
    made = rebuilt(about, {f"up.{key}": tensor for key, tensor in layer.state_dict().items()}, "up", {})
    assert not made._forward_hooks and made.training and list(made._modules) == ["compressed"]
