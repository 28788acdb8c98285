r"""The weights that the testbed's training starts from: a circuit that copies stands in them already.

A decoder learns to look up what came next the last time by two heads that work together: one writes to each position the token
before it, and one of a later layer looks for the position whose token before is the present token (Olsson et al.,
arXiv 2209.11895). Neither is of use without the other, so training stands still until both are there, which is most of what a model of this size
would need. Here they are set, and training goes on from there; every weight of them is trained.

    layer 0, heads 0, 1, 2    look one, two and three tokens back, by the biases of q and k alone; head 0 writes what it sees
    layer 1, head 0           has q of the present token, k of the token before, and writes the token that it finds
    all other outputs         0, so that nothing drowns what these write; and embeddings are large, with a small gain of the last
                              norm instead, so that an optimizer's first steps do not, either

Not here: anything of the tasks; copies of random tokens are all that the circuit can do.
"""

from typing import cast

import torch
from torch import Tensor, nn

from refimpl.model.config import Config
from refimpl.model.model import Block, Decoder, SwiGLU, initialize_
from refimpl.model.rope import rotate

LOOK_BACK = (1, 2, 3)  # tokens, of the first heads of layer 0
EMBEDDING, LAST_NORM = 0.2, 0.1  # standard deviation of an embedding's entries; gain before the logits
BIAS = 5.0  # of each turning pair: sharp enough that a head sees one token, see the test
MATCH = 2.5  # gain of q and k each where tokens are matched
COPY = 10.0  # size of what is written for a token found, in embeddings


@torch.no_grad()
def start(config: Config, generator: torch.Generator) -> Decoder:
    """A decoder to be trained.

    Args:
        config: at least two layers of at least four heads, biases of q, k and v.
        generator: source of all that is drawn.

    Raises:
        ValueError: a config in which the circuit has no place.
    """
    if config.n_layers < 2 or config.n_heads < 4 or not config.qkv_bias or 2 * config.head_dim > config.d_model:
        raise ValueError(
            f"the circuit needs 2 layers, 4 heads, biases and d_model of 2 head_dim or more; the config has {config}"
        )
    model = initialize_(Decoder(config), generator)
    nn.init.normal_(model.embedding.weight, std=EMBEDDING, generator=generator)
    model.norm.weight.fill_(LAST_NORM)
    for block in _blocks(model):
        block.attention.o_proj.weight.zero_()
        cast(SwiGLU, block.feed_forward).down_proj.weight.zero_()
    _look_back_(model)
    _copy_(model, generator)
    return model


def _look_back_(model: Decoder) -> None:
    """Biases of q and k that agree best where k stands `LOOK_BACK` tokens before q, whatever the tokens are."""
    attention, config = _blocks(model)[0].attention, model.config
    d = config.head_dim
    cos, sin = model.rotary(torch.arange(max(LOOK_BACK) + 1)[None], torch.float32)
    k = torch.cat([torch.full((d // 2,), BIAS), torch.zeros(d // 2)])
    for head, distance in enumerate(LOOK_BACK):
        kv = head * config.n_kv_heads // config.n_heads
        attention.k_proj.bias[kv * d : (kv + 1) * d] = k
        back = cos[..., [distance], :], -sin[..., [distance], :]  # turned back by that many positions
        attention.q_proj.bias[head * d : (head + 1) * d] = rotate(k.view(1, 1, 1, d), *back).flatten()


def _copy_(model: Decoder, generator: torch.Generator) -> None:
    """Layer 0's head 0 writes the token before into a space of its own; layer 1's head 0 matches it with the present token."""
    config = model.config
    d = config.head_dim
    present, before, found = (_directions(config, generator) for _ in range(3))
    first, second = (block.attention for block in _blocks(model)[:2])
    first.v_proj.weight[:d] = present
    first.o_proj.weight[:, :d] = EMBEDDING * before.T
    slow = torch.arange(d) % (d // 2) >= d // 4  # pairs that hardly turn within a context match at any distance
    second.q_proj.weight[:d] = MATCH * present * slow[:, None]
    second.k_proj.weight[:d] = MATCH * before * slow[:, None]
    second.v_proj.weight[:d] = found
    second.o_proj.weight[:, :d] = COPY * EMBEDDING * found.T


def _blocks(model: Decoder) -> list[Block]:
    return [cast(Block, block) for block in model.layers]


def _directions(config: Config, generator: torch.Generator) -> Tensor:
    """`head_dim` random orthonormal rows, `[head_dim, d_model]`."""
    drawn = torch.randn(config.d_model, config.d_model, generator=generator)
    orthonormal: Tensor = torch.linalg.qr(drawn)[0]
    return orthonormal[: config.head_dim].contiguous()
