"""Models of two branches a layer: the blocks written out, states, what an embedding goes through."""

import torch
from torch import nn
from torch.testing import assert_close

from refimpl.architecture.alternatives.language_model import LanguageModelConfig, States
from refimpl.architecture.alternatives.other.two_branch_model import TwoBranchModel
from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention

TOKENS = torch.arange(14).view(2, 7)


class Doubled(TwoBranchModel):
    def embedded(self, x):
        return 2 * x


def make(kind, generator):
    def branch(layer):
        asked.append(layer)
        return SoftmaxAttention(head_dim=4).build(8, generator)

    asked = []
    model = kind(LanguageModelConfig(vocabulary=20, d_model=8, n_layers=2), branch, branch, nn.LayerNorm)
    assert asked == [0, 0, 1, 1]
    return model


def test_equals_the_blocks_written_out(generator):
    """Oracle: x + f(norm(x)) for each branch, and the embedding as output layer; what `embedded` does counts."""
    model = make(Doubled, generator)
    with torch.no_grad():
        x = 2 * model.embedding.weight[TOKENS]
        for block in model.layers:
            x = x + block.mixer((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt())
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        assert_close(model(TOKENS), x @ model.embedding.weight.T, rtol=1e-4, atol=1e-5)
        assert_close(model(TOKENS), model(model.embedding(TOKENS)))  # embeddings may be given
    assert model.config.n_layers == 2 and len(model.layers) == 4


def test_pieces_equal_the_whole(generator):
    """Oracle: the whole in one call."""
    model, states = make(TwoBranchModel, generator), States()
    pieces = torch.cat([model(part, states) for part in TOKENS.split([3, 1, 3], dim=1)], dim=1)
    assert_close(pieces, model(TOKENS), rtol=1e-4, atol=1e-5)
    assert states.length == 7 and len(states.layers) == 4
