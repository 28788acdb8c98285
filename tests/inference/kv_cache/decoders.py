"""Tiny decoders, and keys as a decoder would turn them."""

import torch

from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import Rotary, rotate


def shape(**changes):
    """Two layers; heads of 32, in which groups of 32 fit."""
    sizes = {"vocabulary": 61, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "d_ff": 20}
    return Config(**(sizes | {"rope": Rope(theta=500.0)} | changes))


def decoder(dtype=torch.float64, **changes):
    """In float64, where rounding does not change a code."""
    return (
        initialize_(Decoder(shape(**changes)), torch.Generator().manual_seed(0), std=0.3)
        .to(dtype)
        .requires_grad_(False)
    )


def run(model, tokens, cache, sizes, padding=None):
    """Logits of tokens read in chunks."""
    return torch.cat([model(chunk, cache, padding) for chunk in tokens.split(sizes, dim=1)], dim=1)


def feed(cache, config, k, v, sizes, layer=0):
    """Hand unrotated keys `[rows, kv_heads, tokens, head_dim]` to a cache in chunks, as a decoder without padding would; yields each result."""
    done, rotary = 0, Rotary(config)
    for size in sizes:
        part = slice(done, done + size)
        positions = torch.arange(cache.length, cache.length + size)[None]
        turned = rotate(k[:, :, part], *rotary(positions, k.dtype))
        queries = turned.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1)
        yield cache.update(layer, turned, v[:, :, part], queries, positions)
        done += size


def draw(generator, config, tokens, rows=1, dtype=torch.float32):
    """Keys and values."""
    return tuple(
        torch.randn(rows, config.n_kv_heads, tokens, config.head_dim, generator=generator).to(dtype) for _ in range(2)
    )
