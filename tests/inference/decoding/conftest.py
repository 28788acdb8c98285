"""Targets, and drafts that guess well, badly, or not at all."""

import copy

import pytest
import torch

from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder, initialize_

SIZES = {"vocabulary": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
TARGETS = {
    "full": {},
    "windows": {"sliding_window": (None, 5, 3)},
    "qwen": {"qkv_bias": True, "qk_norm": True, "tied_embeddings": True, "rope": Rope(theta=500.0)},
}


@pytest.fixture(params=TARGETS)
def target(request, generator):
    return initialize_(Decoder(Config(**SIZES, **TARGETS[request.param])), generator, std=0.3)


def noisy(model, generator, noise=0.03):
    """A copy that often, and not always, chooses as the model does."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def drafts(target, generator):
    """By kind: nearly the target, the target itself, and a smaller one that knows nothing."""
    small = Config(**{**SIZES, "n_layers": 1, "d_model": 16, "n_kv_heads": 4})
    return {
        "good": noisy(target, generator),
        "itself": target,
        "bad": initialize_(Decoder(small), generator, std=0.3),
    }
