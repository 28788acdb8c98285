r"""Beam search: the likeliest continuations of a prompt as a whole, found by keeping the best few beginnings at each step.

Source: none, the textbook's search; `sequence-kd` (arXiv 1606.07947), Section 3.2, takes a model's likeliest text from it.

Differs from transformers' `generate(num_beams=…)`: returns the new tokens only, with their log-probability as it is; an ended
continuation keeps its place among the best until better ones push it out, and is not set aside.

Not here: a penalty or norm of length, groups of diverse beams, sampling within a beam.
"""

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from refimpl.model.cache import Cache, FullCache
from refimpl.model.generate import check_arguments
from refimpl.model.model import Decoder


class Beams(NamedTuple):
    """The best continuations, best first.

    Attributes:
        tokens: `[batch, beams, at most n]`.
        scores: `[batch, beams]`, log-probability in nats, float32 at least; minus infinity where a row has fewer continuations.
    """

    tokens: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    model: Decoder,
    tokens: Tensor,
    n: int,
    beams: int,
    *,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    cache: "RowsCache | None" = None,
) -> Beams:
    r"""Continue prompts by up to `n` tokens $y$ of high $\log p(y \mid x) = \sum_t \log p(y_t \mid x, y_{<t})$.

    One beam is greedy decoding; as many beams as there are beginnings of n - 1 tokens find the likeliest of all.

    Args:
        model: the decoder.
        tokens: `[batch, time]`, the prompts, padded at the left (see `generate.pad`).
        n: new tokens, 1 or more.
        beams: beginnings that are kept, 1 or more.
        stop: tokens that end a continuation; what follows repeats the one that ended it, at no cost.
        padding: `[batch]`, tokens of left padding in each row.
        cache: an empty one, of which beams choose rows; None makes a `RowCache`.

    Returns:
        As many continuations as beams, or all that there are; fewer tokens than n if every one has ended.

    Raises:
        ValueError: an argument outside its range, or a token outside the vocabulary.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> found = beam_search(model, torch.tensor([[5, 7, 33]]), 4, beams=3)
        >>> found.tokens.shape, bool((found.scores.diff() <= 0).all())
        (torch.Size([1, 3, 4]), True)
    """
    check_arguments(model, tokens, n, 0.0, None, padding)
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1")
    batch, vocabulary = len(tokens), model.config.vocabulary
    first_row = torch.arange(batch, device=tokens.device)[:, None]
    ends = torch.tensor(sorted(stop), device=tokens.device, dtype=torch.int64)
    if cache is None:
        cache = RowCache(model.config.sliding_window, reserve=tokens.shape[1] + n - 1)
    scores = torch.zeros(batch, 1, device=tokens.device, dtype=torch.float32)
    ended = torch.zeros(batch, 1, device=tokens.device, dtype=torch.bool)
    written = tokens.new_zeros(batch, 1, 0)
    new = tokens
    while True:
        k = scores.shape[1]
        logits = model.logits(model.hidden(new, cache, padding)[:, -1])
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).view(batch, k, vocabulary)
        if bool(ended.any()):
            again = torch.full_like(log_p, float("-inf")).scatter(2, written[:, :, -1:], 0.0)
            log_p = torch.where(ended[:, :, None], again, log_p)
        total = (scores[:, :, None] + log_p).flatten(1)
        scores, place = total.topk(min(beams, total.shape[1]), dim=1)
        origin, following = place // vocabulary, place % vocabulary  # [b, k]
        written = torch.cat((written[first_row, origin], following[:, :, None]), dim=2)
        ended = ended[first_row, origin] | torch.isin(following, ends)
        if written.shape[2] == n or bool(ended.all()):
            return Beams(written, scores)
        rows = (first_row * k + origin).flatten()
        cache.select(rows)
        padding = None if padding is None else padding[rows]
        new = following.view(-1, 1)


class RowsCache(Cache, Protocol):
    """A cache whose rows can be chosen, repeated and put into another order."""

    def select(self, rows: Tensor) -> None:
        """Go on with these of the rows held, `[new batch]`."""
        ...


class RowCache(FullCache):
    """A full cache whose rows are copied where they are chosen."""

    def select(self, rows: Tensor) -> None:
        """Go on with these of the rows held, `[new batch]`."""
        for held in self._layers.values():
            held.k, held.v = held.k[rows], held.v[rows]
