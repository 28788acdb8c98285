"""Tiny decoders to serve with."""

import pytest

from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder, initialize_

SIZES = {"vocabulary": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
MODELS = {
    "full": {},
    "windows": {"sliding_window": (5, None)},
    "qwen": {"qkv_bias": True, "qk_norm": True, "tied_embeddings": True, "rope": Rope(theta=500.0)},
}


@pytest.fixture(params=MODELS)
def model(request, generator):
    """With heads in groups; weights so large that attention is far from flat."""
    return initialize_(Decoder(Config(**SIZES, **MODELS[request.param])), generator, std=0.3).requires_grad_(False)


@pytest.fixture
def plain(generator):
    """The first of them, where one is enough."""
    return initialize_(Decoder(Config(**SIZES)), generator, std=0.3).requires_grad_(False)
