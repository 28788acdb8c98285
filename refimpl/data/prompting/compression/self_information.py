r"""Self-information: how little a causal model expected each token of a text.

Source: `selective-context` (arXiv 2310.06201), Eq. (1): $I(x_t) = -\log p(x_t \mid x_{<t})$; `llmlingua` (arXiv 2310.05736) calls its
mean over a text the logarithm of the perplexity. In nats, as both official codes compute it; the order is that of bits.

Differs from the paper: a text is read after the tokens that the tokenizer begins one with, or after a line break where it has none,
so that its first token has a value too; where a line break is no token either, that value is the logarithm of the vocabulary's size.

Not here: which tokens stay.

Examples:
    >>> from refimpl.model.config import Config
    >>> config = Config(vocabulary=8, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=4)
    >>> model = Decoder(config).requires_grad_(False)
    >>> _ = model.embedding.weight.zero_(), model.lm_head.weight.zero_()  # knows nothing: log 8 for every token
    >>> self_information(model, [[1, 2, 3], [4]], [0])
    [tensor([2.0794, 2.0794, 2.0794]), tensor([2.0794])]
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from refimpl.model.cache import FullCache
from refimpl.model.generate import pad
from refimpl.model.model import Decoder

TOGETHER = 4096  # tokens read at once, padding included
LOGITS = 512  # positions whose logits are held at once


def asked(model: Decoder | None, tokenizer: Tokenizer, method: str) -> Decoder:
    """The model that a method asks.

    Raises:
        ValueError: there is none, or it knows fewer tokens than the tokenizer.
    """
    if model is None:
        raise ValueError(f"{method} asks a causal model: pass one with this tokenizer as model")
    if tokenizer.get_vocab_size() > model.config.vocabulary:
        raise ValueError(
            f"model knows {model.config.vocabulary} tokens, the tokenizer {tokenizer.get_vocab_size()}: "
            "pass the tokenizer that the model was trained with"
        )
    return model


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What is read before a text: the tokenizer's own tokens for that, else a line break; may be empty."""
    return list(tokenizer.encode("").ids or tokenizer.encode("\n", add_special_tokens=False).ids)


@torch.no_grad()
def self_information(model: Decoder, texts: Sequence[Sequence[int]], start: Sequence[int] = ()) -> list[Tensor]:
    """Of each token, given those before it in its text.

    Args:
        model: the causal model; read in batches, equal texts once.
        texts: tokens of each, any number; one that is longer than the model's positions is read in pieces, each after `start`.
        start: tokens read before every text.

    Returns:
        For each text `[its tokens]`, nats, float32, on the CPU.
    """
    room = max(1, model.config.max_positions - len(start))
    pieces = [[tuple(text[a : a + room]) for a in range(0, len(text), room)] for text in texts]
    waiting = sorted({piece for text in pieces for piece in text}, key=len)
    found: dict[tuple[int, ...], Tensor] = {}
    while waiting:
        longest = len(waiting[-1]) + len(start)
        rows = waiting[-max(1, TOGETHER // longest) :]
        del waiting[-len(rows) :]
        found |= zip(rows, _batch(model, rows, start), strict=True)
    return [torch.cat([found[piece] for piece in text]) if text else torch.zeros(0) for text in pieces]


def _batch(model: Decoder, rows: Sequence[tuple[int, ...]], start: Sequence[int]) -> list[Tensor]:
    device = model.embedding.weight.device
    tokens, padding = (x.to(device) for x in pad([[*start, *row] for row in rows]))
    hidden = model.hidden(tokens, padding=padding if padding.any() else None)
    shown = torch.arange(tokens.shape[1], device=device) >= (padding + max(1, len(start))).unsqueeze(1)
    # what a token is told by stands one place before it
    told = surprise(model, hidden[:, :-1][shown[:, 1:]], tokens[shown])
    unknown = [math.log(model.config.vocabulary)] * (not start)
    parts = torch.split(told.cpu(), [len(row) - len(unknown) for row in rows])
    return [torch.cat((torch.tensor(unknown), part)) for part in parts]


def surprise(model: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    r"""$-\log p$ of tokens `[n]` given the decoder's outputs before them `[n, d_model]`: `[n]`, nats, float32."""
    if not len(tokens):
        return torch.zeros(0, device=tokens.device)
    found = [
        F.cross_entropy(model.logits(part).float(), target, reduction="none")
        for part, target in zip(torch.split(hidden, LOGITS), torch.split(tokens, LOGITS), strict=True)
    ]
    return torch.cat(found)


class Reading:
    r"""A model that has read what was kept of a text so far, and judges what comes next: $-\log p(s_{j,i} \mid s_{j,<i}, \tilde s_{<j})$.

    Keys and values of what was kept are held in a cache. Those of the part judged last were computed among tokens that have gone, so
    what was kept of it is read once more, together with the next part: each token is read once, each kept one twice.

    Args:
        model: the causal model.
        start: tokens read before all.
    """

    def __init__(self, model: Decoder, start: Sequence[int] = ()) -> None:
        self.model, self.cache = model, FullCache()
        self._pending = torch.tensor([*start], dtype=torch.int64)
        self._last: Tensor | None = None  # the model's output at the last token that stays in the cache

    @torch.no_grad()
    def judge(self, tokens: Tensor) -> Tensor:
        """Self-information of the next part, given what was kept before it, `[n]`, nats, float32, on the CPU.

        Args:
            tokens: `[n]`, int64, at least one.
        """
        here, device = len(self._pending), self.model.embedding.weight.device
        before, read = self.cache.length, torch.cat((self._pending, tokens)).to(device)
        hidden = self.model.hidden(read.unsqueeze(0), self.cache)[0]
        if here:
            self._last = hidden[here - 1]
        self.cache.truncate(before + here)
        self._pending = self._pending[:0]
        if self._last is None:
            unknown = torch.tensor([math.log(self.model.config.vocabulary)])
            return torch.cat((unknown, surprise(self.model, hidden[:-1], read[1:]).cpu()))
        return surprise(self.model, torch.cat((self._last.unsqueeze(0), hidden[here:-1])), read[here:]).cpu()

    def keep(self, tokens: Tensor) -> None:
        """What stays of the part judged last, `[kept]`, perhaps nothing."""
        self._pending = tokens
