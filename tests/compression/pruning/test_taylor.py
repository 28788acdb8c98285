"""Importance of groups: from its definition, text by text and head by head; and of layers kept the other way round."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.pruning.dependency import coupled_groups
from refimpl.compression.pruning.taylor import importance
from refimpl.model.linear import is_linear, is_transposed
from refimpl.model.train import next_token_loss
from tests.compression.conftest import decoder


def by_hand(model, tokens, taylor):
    """Importance of each channel of each layer of block 1, by loops over texts, in float64."""
    model = copy.deepcopy(model).double()
    names = [name for name, module in model.layers[1].named_modules() if is_linear(module)]
    mean, square = (dict.fromkeys(names, 0) for _ in range(2))
    for text in tokens:
        model.zero_grad()
        next_token_loss(model, text[None]).backward()
        for name in names:
            gradient = model.layers[1].get_submodule(name).weight.grad
            mean[name] = mean[name] + gradient / len(tokens)
            square[name] = square[name] + gradient**2 / len(tokens)
    found = {}
    for name in names:
        w = model.layers[1].get_submodule(name).weight.detach()
        gw, wgw = w * mean[name], w * square[name] * w
        across = 0 if name.endswith(("o_proj", "down_proj")) else 1
        found[name.rpartition(".")[2]] = {
            "first": gw.abs().sum(across),
            "vector": gw.sum(across).abs(),
            "second": wgw.sum(across),
            "mixed": (gw - 0.5 * wgw).abs().sum(across),
        }[taylor]
    return found


@pytest.mark.parametrize("taylor", ["first", "vector", "second", "mixed"])
def test_importance_by_definition(taylor, tokens):
    """Oracle: Eq. (3) to (5), by loops over texts and slices of heads; sum, product, maximum and the last layer by hand."""
    model = decoder()
    families = coupled_groups(model, tokens, anatomy(model).blocks[1].linear)
    channel = by_hand(model, tokens[:2], taylor)
    heads = [
        torch.stack([channel[name].view(2, -1)[group].sum() for name in ("q_proj", "k_proj", "v_proj", "o_proj")])
        for group in range(2)
    ]
    neurons = [torch.stack([channel[name][j] for name in ("gate_proj", "up_proj", "down_proj")]) for j in range(40)]
    for aggregation, together in {
        "sum": lambda layers: layers.sum(),
        "prod": lambda layers: layers.prod(),
        "max": lambda layers: layers.max(),
        "last": lambda layers: layers[-1],
    }.items():
        found = importance(model, families, [tokens[:1], tokens[1:]], taylor, aggregation, samples=2)
        for scores, groups in zip(found, (heads, neurons), strict=True):
            assert_close(scores, torch.stack([together(layers) for layers in groups]), rtol=1e-4, atol=1e-9)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_transposed_layers_are_scored_alike(generator):
    """Oracle: the same model with its weights the other way round."""
    from transformers.pytorch_utils import Conv1D

    class Text(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.embedding, self.blocks = (
                nn.Embedding(7, 4),
                nn.ModuleList([nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 7))]),
            )

        def forward(self, tokens):
            return self.blocks[0](self.embedding(tokens))

    plain, turned = Text(nn.Linear), Text(lambda read, made: Conv1D(made, read))
    turned.embedding = plain.embedding
    for mine, theirs in zip(plain.blocks[0][::2], turned.blocks[0][::2], strict=True):
        assert is_transposed(theirs)
        theirs.weight.data, theirs.bias.data = mine.weight.detach().T.contiguous(), mine.bias.detach()
    text = [torch.randint(0, 7, (2, 9), generator=generator)]
    scores = [importance(m, coupled_groups(m, text[0]), text)[0] for m in (plain, turned)]
    assert len(scores[0]) == 6
    assert_close(scores[0], scores[1])


def test_a_layer_without_influence_is_refused(tokens):
    """The loss does not depend on what another layer makes of a layer's output where that is thrown away."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(61, 61), nn.Linear(61, 3), nn.Linear(3, 61)
            self.c, self.d = nn.Linear(61, 2), nn.Linear(2, 61)

        def forward(self, tokens):
            x = self.embedding(tokens)
            self.b(self.a(x))
            return self.d(self.c(x))

    model = Text()
    with pytest.raises(ValueError, match="does not depend on layer 'a'"):
        importance(model, coupled_groups(model, tokens), [tokens])
