"""What all pre-training methods share: parts, parameters by role, bytes of state; the list of methods is the taxonomy's."""

from typing import get_args

import pytest
import torch
from torch import nn

import taxonomy
from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.pretraining.protocol import Part, parameter_groups, state_bytes

PARTS = {
    "optimizers": "optimizer",
    "mixed_precision": "precision",
    "scaling": "growth",
    "initialization": "initialization",
}
METHODS = [
    method
    for method in taxonomy.load().find(category="pretraining", implemented=True)
    if method.category.rpartition("/")[2] in PARTS
]


def decoder(tied=False):
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 12}
    return Decoder(Config(vocabulary=11, tied_embeddings=tied, qkv_bias=True, **sizes))


def roles(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["role"]: [names[id(p)] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
def test_a_method_names_the_part_that_it_replaces(method):
    """Oracle: the folder it stands in."""
    assert method.load().part == PARTS[method.category.rpartition("/")[2]]
    assert method.load().part in get_args(Part)
    assert "pre-training" in method.facets.stage


def test_roles_of_a_decoder():
    """Oracle: by hand. Seven matrices, three biases and two gains a layer, a last gain, embedding and output."""
    model = decoder()
    groups = parameter_groups(model, weight_decay=0.3)
    found = roles(model, groups)
    assert list(found) == ["hidden", "embedding", "output", "vector"]
    assert (len(found["hidden"]), len(found["vector"])) == (2 * 7, 2 * 5 + 1)
    assert (found["embedding"], found["output"]) == (["embedding.weight"], ["lm_head.weight"])
    assert all(name.endswith(("norm.weight", ".bias")) for name in found["vector"])
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.3, 0.0]


def test_a_tied_output_is_an_embedding_and_stands_once():
    model = decoder(tied=True)
    found = roles(model, parameter_groups(model))
    assert "output" not in found and found["embedding"] == ["embedding.weight"]
    assert sum(map(len, found.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_roles_of_a_hugging_face_model(tied):
    """Oracle: transformers' own names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied))
    found = roles(model, parameter_groups(model))
    assert found["embedding"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert found.get("output", []) == ([] if tied else ["lm_head.weight"])
    assert len(found["hidden"]) == 4


def test_roles_of_any_module():
    """Oracle: by hand. The last matrix is the output layer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert roles(model, parameter_groups(model)) == {
        "hidden": ["0.weight", "2.weight"],
        "output": ["3.weight"],
        "vector": ["0.bias", "2.bias", "3.bias"],
    }


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert roles(model, parameter_groups(model)) == {"output": ["1.weight"], "vector": ["1.bias"]}
    with pytest.raises(ValueError, match="takes a gradient"):
        parameter_groups(model.requires_grad_(False))


def test_state_bytes_by_hand():
    """Oracle: by hand. Two moments of 15 and 4 numbers and two step counts, 4 bytes each."""
    weights = [nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9))]
    optimizer = torch.optim.AdamW(weights)
    assert state_bytes(optimizer) == 0
    for weight in weights[:2]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (2 * (15 + 4) + 2)


def test_state_bytes_sees_what_is_nested_and_counts_memory_once():
    """Oracle: by hand. A view holds its whole storage; a tensor that stands twice is held once."""
    weight, held = nn.Parameter(torch.ones(2)), torch.zeros(8)
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"pair": [held[:2], (held,)], "deep": {"x": torch.zeros(3, dtype=torch.float64)}, "n": 3}
    assert state_bytes(optimizer) == 8 * 4 + 3 * 8
