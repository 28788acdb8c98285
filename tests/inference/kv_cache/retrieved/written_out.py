"""A decoder written out, in which a test says what each layer's queries find in the past."""

import torch

from refimpl.model.rope import rotate


def stepped(model, tokens, sizes, find):
    """Logits of tokens read in calls of these sizes, without padding.

    `find(layer, q, k, v, start)` gets a call's queries `[rows, heads, time, d]` and all keys and values so far, one for each query
    head, none of them rotated; it returns what the queries find, `[rows, heads, time, d]`.
    """
    past, logits, start = {}, [], 0
    for chunk in tokens.split(sizes, dim=1):
        x = model.embedding(chunk)
        for i, layer in enumerate(model.layers):
            a, y = layer.attention, layer.attention_norm(x)
            q, k, v = (p(y).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            k, v = (new.repeat_interleave(q.shape[1] // new.shape[1], dim=1) for new in (k, v))
            if start:
                k, v = (torch.cat(pair, dim=2) for pair in zip(past[i], (k, v), strict=True))
            past[i] = k, v
            x = x + a.o_proj(find(i, q, k, v, start).transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
        logits.append(model.logits(model.norm(x)))
        start += chunk.shape[1]
    return torch.cat(logits, dim=1)


def turned(model, x, positions):
    """`[..., time, d]` rotated to positions `[time]`."""
    return rotate(x, *model.rotary(torch.as_tensor(positions)[None], x.dtype))
