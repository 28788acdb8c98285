"""Dropping written out: a decoder that holds everything, and masks what a rule has dropped."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from refimpl.model.rope import rotate


def masked(model, tokens, sizes, rule):
    """Logits of tokens read in chunks, without padding.

    After each chunk `rule(state, weights, layer)` changes `state.alive` `[rows, kv_heads, n]`: which of the n tokens so far each key
    head may see from now on. It gets the weights `[rows, heads, time, n]` of the chunk's queries, and may keep what it likes in `state`.
    """
    states = [SimpleNamespace() for _ in model.layers]
    logits, start = [], 0
    for chunk in tokens.split(sizes, dim=1):
        x, n = model.embedding(chunk), start + chunk.shape[1]
        places, now = torch.arange(n), torch.arange(start, n)[:, None]
        for i, (layer, state) in enumerate(zip(model.layers, states, strict=True)):
            a, y = layer.attention, layer.attention_norm(x)
            q, k, v = (p(y).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            cos, sin = model.rotary(now.T, q.dtype)
            q, k, new = rotate(q, cos, sin), rotate(k, cos, sin), torch.ones(k.shape[:3], dtype=torch.bool)
            if start:
                k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
                new = torch.cat([state.alive, new], dim=2)
            state.k, state.v, state.alive = k, v, new
            group = q.shape[1] // k.shape[1]
            seen = state.alive.unsqueeze(2) & (places <= now) & (now - places < (a.window or math.inf))
            state.seen = seen
            scores = q @ k.repeat_interleave(group, dim=1).mT / math.sqrt(a.head_dim)
            weights = scores.masked_fill(~seen.repeat_interleave(group, dim=1), float("-inf")).softmax(dim=-1)
            out = weights @ v.repeat_interleave(group, dim=1)
            x = x + a.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
            rule(state, weights, i)
        logits.append(model.logits(model.norm(x)))
        start = n
    return torch.cat(logits, dim=1)


def by_key_head(weights, kv_heads):
    """`[rows, heads, ...]` to `[rows, kv_heads, group, ...]`."""
    return weights.unflatten(1, (kv_heads, -1))


def widened(x, n):
    """A state's `[..., tokens]` with zeros for the tokens that are new."""
    return F.pad(x, (0, n - x.shape[-1]))


def keep_only(state, choose):
    """`choose(row, head, the tokens alive in order)` for each head: those that stay."""
    for row, head in torch.cartesian_prod(*(torch.arange(size) for size in state.alive.shape[:2])).tolist():
        stay = choose(row, head, state.alive[row, head].nonzero().flatten().tolist())
        state.alive[row, head] = False
        state.alive[row, head, stay] = True
