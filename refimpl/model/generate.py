r"""Decoding token by token: greedy, or sampled at a temperature.

Source: none, the textbook's loop. Differs from transformers' `generate`: returns the new tokens only.

Not here: beams (`beam`), top-k and top-p, penalties; speculative decoding is in `refimpl/inference/decoding`.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from refimpl.model.cache import Cache, FullCache
from refimpl.model.model import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    n: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    cache: Cache | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Continue prompts by up to `n` tokens.

    Args:
        model: the decoder.
        tokens: `[batch, time]`, the prompts, padded at the left (see `pad`); what comes after the tokens in `cache`.
        n: new tokens, 1 or more.
        temperature: 0 takes the likeliest token (the first of equals), above 0 draws from softmax(logits / temperature).
        generator: source of the draws, on the model's device; needed if temperature is not 0.
        stop: tokens that end a row; what follows in it repeats the one that ended it.
        padding: `[batch]`, tokens of left padding in each row, counted from the start of the cache.
        cache: past and new keys and values; None makes a `FullCache`. Afterwards it holds all but the last token.
        prefill_chunk: prompt's tokens read at once, which bounds the memory of activations; None reads all at once.

    Returns:
        `[batch, at most n]`, the new tokens; fewer than n if every row has ended.

    Raises:
        ValueError: an argument outside its range, or a token outside the vocabulary.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> generate(model, torch.tensor([[5, 7, 33]]), 4).shape
        torch.Size([1, 4])
    """
    past = 0 if cache is None else cache.length
    check_arguments(model, tokens, n, temperature, generator, padding, prefill_chunk, past)
    if cache is None:
        cache = FullCache(model.config.sliding_window, reserve=tokens.shape[1] + n - 1)
    for chunk in torch.split(tokens, prefill_chunk or tokens.shape[1], dim=1):
        hidden = model.hidden(chunk, cache, padding)
    cache.compress_prefill()
    ends = torch.tensor(sorted(stop), device=tokens.device) if stop else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    new: list[Tensor] = []
    while True:
        following = chosen(model.logits(hidden[:, -1]), temperature, generator)  # [b]
        if ends is not None:
            if new:
                following = torch.where(ended, new[-1], following)
            ended |= torch.isin(following, ends)
        new.append(following)
        if len(new) == n or (ends is not None and bool(ended.all())):
            return torch.stack(new, dim=1)
        hidden = model.hidden(following.unsqueeze(1), cache, padding)


def pad(rows: Collection[Collection[int]], token: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch, padded at the left.

    Args:
        rows: the prompts, none of them empty.
        token: what to pad with; no result depends on it.

    Returns:
        Tokens `[batch, time]` and padding `[batch]`.

    Raises:
        ValueError: no prompt, or an empty one.

    Examples:
        >>> tokens, padding = pad([[5, 7, 33], [8]])
        >>> tokens.tolist(), padding.tolist()
        ([[5, 7, 33], [0, 0, 8]], [0, 2])
    """
    if not rows or not all(rows):
        raise ValueError(f"prompts of {[len(row) for row in rows]} tokens: one is needed, and none may be empty")
    time = max(len(row) for row in rows)
    padding = [time - len(row) for row in rows]
    filled = [[token] * gap + [*row] for gap, row in zip(padding, rows, strict=True)]
    return torch.tensor(filled), torch.tensor(padding)


def chosen(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token of each row, `[batch]`, from logits `[batch, vocabulary]`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, temperature), 1, generator=generator).squeeze(1)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """What tokens are drawn from at a temperature above 0: `[..., vocabulary]` to the same, float32 at least.

    Examples:
        >>> probabilities(torch.tensor([0.0, 2.0]), 2.0).tolist()
        [0.2689414322376251, 0.7310585975646973]
    """
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(dim=-1)


def check_arguments(
    model: Decoder,
    tokens: Tensor,
    n: int,
    temperature: float,
    generator: torch.Generator | None,
    padding: Tensor | None,
    prefill_chunk: int | None = None,
    past: int = 0,
) -> None:
    """Check what `generate` and every other way of decoding is called with; `past` tokens of each row came before.

    Raises:
        ValueError: an argument outside its range, or a token outside the vocabulary.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} must be [batch, time], not empty")
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= model.config.vocabulary:
        raise ValueError(f"tokens range from {low} to {high}, the vocabulary from 0 to {model.config.vocabulary - 1}")
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
    if temperature > 0 and generator is None:
        raise ValueError(f"temperature={temperature} draws tokens: pass a torch.Generator as generator")
    most = past + tokens.shape[1]
    if padding is not None and (padding.shape != tokens.shape[:1] or bool(((padding < 0) | (padding >= most)).any())):
        raise ValueError(
            f"padding={padding.tolist()} must be a count for each of {len(tokens)} rows, below their {most} tokens: leave empty "
            "prompts out"
        )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
