"""Channels cut out of modules: by indexing, and by models whose heads are counted anew."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.pruning.slimming import keep_inputs_, keep_outputs_, recount_heads_
from refimpl.model.model import RMSNorm
from tests.compression.conftest import gpt2, opt


def modules():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made = {"linear": nn.Linear(3, 5), "conv1d": Conv1D(5, 3), "bare": nn.Linear(3, 5, bias=False)}
    made |= {"embedding": nn.Embedding(3, 5), "layer_norm": nn.LayerNorm(5), "rms_norm": RMSNorm(5, 1e-6)}
    for module in made.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bare", "embedding"])
@pytest.mark.parametrize("scale", [None, torch.tensor([2.0, -1.0])])
def test_outputs_are_those_kept(kind, scale, generator):
    """Oracle: indexing what the whole module makes. Nothing else is held."""
    module, kept = modules()[kind], torch.tensor([4, 1])
    x = torch.tensor([[0, 2]]) if kind == "embedding" else torch.randn(2, 3, generator=generator)
    before = module(x)[..., kept] * (1 if scale is None else scale)
    module.weight.requires_grad_(False)
    keep_outputs_(module, kept, scale)
    assert_close(module(x), before)
    assert module.weight.numel() == 6 and module.weight.is_contiguous() and not module.weight.requires_grad
    assert "5" not in repr(module)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norms_are_over_what_is_kept(kind, generator):
    """Oracle: PyTorch's functions, over the channels that stay."""
    module, kept, scale = modules()[kind], torch.tensor([0, 3, 4]), torch.tensor([1.0, 2.0, 3.0])
    weight, bias, x = module.weight[kept], getattr(module, "bias", None), torch.randn(2, 3, generator=generator)
    keep_outputs_(module, kept, scale)
    if bias is None:
        expected = nn.functional.rms_norm(x, (3,), weight * scale, 1e-6)
    else:
        expected = nn.functional.layer_norm(x, (3,), weight * scale, bias[kept] * scale, 1e-5)
    assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bare"])
def test_inputs_are_those_kept(kind, generator):
    """Oracle: the whole layer on inputs that are zero where nothing is kept."""
    module, kept, x = modules()[kind], torch.tensor([0, 2]), torch.randn(2, 3, generator=generator)
    before = module(x.index_fill(1, torch.tensor([1]), 0) * torch.tensor([0.5, 1.0, 3.0]))
    keep_inputs_(module, kept, torch.tensor([0.5, 3.0]))
    assert_close(module(x[:, kept]), before)


def test_half_precision_is_kept():
    """Oracle: the product in float32, rounded once."""
    layer = nn.Linear(3, 5).bfloat16()
    before = layer.weight[[1, 2]].float() * torch.tensor([[0.3], [0.7]])
    keep_outputs_(layer, torch.tensor([1, 2]), torch.tensor([0.3, 0.7]))
    assert torch.equal(layer.weight, before.bfloat16())


def test_heads_are_counted_where_a_module_counts_them():
    """Oracle: by hand. Three of four heads of eight channels are left."""
    for model, attention, output in (
        (opt(), "model.decoder.layers.1.self_attn", "out_proj"),
        (gpt2(), "transformer.h.1.attn", "c_proj"),
    ):
        keep_inputs_(model.get_submodule(f"{attention}.{output}"), torch.arange(24))
        recount_heads_(model)
        module, other = model.get_submodule(attention), model.get_submodule(attention.replace("1", "0"))
        assert (module.num_heads, other.num_heads) == (3, 4)
        assert getattr(module, "split_size", 24) == 24
