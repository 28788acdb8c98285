r"""The loop of all methods that guess a chain of tokens and let the target check it in one call.

A method brings a drafter, which guesses, and a rule, which says how many guesses stand and what follows them. The loop keeps the
rows: each ends at its own stop token or after n tokens, and in each round takes as many tokens as were accepted in it
(`RaggedCache`). A row that has ended is read on with the others, as in `refimpl.model.generate`; nothing is taken from it.

Source: `speculative-decoding` (arXiv 2211.17192), Section 2 and Eq. (1), Theorem 3.8; there for a single row.

Differs from the paper: no round guesses beyond what n has room for.

Not here: trees of guesses, which need a mask of their own (`tree`); batches that take in a new prompt where one has ended. A prompt is
read in one call. With rotary positions of the type `dynamic`, beyond `max_positions`, a token's frequencies depend on how many
are read with it, so that tokens read in one call are not those read one by one.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refimpl.inference.decoding.protocol import Decoded
from refimpl.inference.decoding.ragged_cache import RaggedCache
from refimpl.model.model import Decoder

SLACK = 16  # room for guesses behind rows that have ended, so that the cache need not grow for them


@dataclass
class Rows:
    """The text so far, prompts included, and which rows go on.

    Attributes:
        text: `[batch, room]`; what follows a row's length means nothing.
        lengths: `[batch]` on the CPU, left padding included.
        end: length at which a row has its n tokens.
        running: `[batch]` on the CPU.
        stops: tokens that end a row.
    """

    text: Tensor
    lengths: Tensor
    end: int
    running: Tensor
    stops: Tensor | None

    @classmethod
    def begin(cls, tokens: Tensor, n: int, stop: Collection[int]) -> "Rows":
        """Prompts `[batch, time]` before the first round."""
        batch, time = tokens.shape
        text = torch.cat((tokens, tokens.new_zeros(batch, n)), dim=1)
        stops = torch.tensor(sorted(stop), device=tokens.device) if stop else None
        return cls(text, torch.full((batch,), time), time + n, torch.ones(batch, dtype=torch.bool), stops)

    @property
    def room(self) -> Tensor:
        """Guesses that each row can take if one token is to follow them, `[batch]` on the CPU; 0 where it has ended."""
        return (self.end - 1 - self.lengths).where(self.running, 0)

    def last(self, count: int) -> Tensor:
        """The last tokens of each row, `[batch, count]`."""
        places = (self.lengths[:, None] - count + torch.arange(count)).to(self.text.device)
        return self.text.gather(1, places)

    def append(self, guesses: Tensor, kept: Tensor, following: Tensor) -> Tensor:
        """Take the first `kept` `[batch]` of the guesses `[batch, guesses]`, then `following` `[batch]`, up to a stop token.

        Returns:
            How many tokens each row took, `[batch]` on the CPU.
        """
        new = torch.cat((guesses, following[:, None]), dim=1).scatter(1, kept[:, None], following[:, None])
        place = torch.arange(new.shape[1], device=new.device)
        taken = kept + 1
        ended = torch.zeros_like(self.running)
        if self.stops is not None:
            ends = torch.isin(new, self.stops) & (place < taken[:, None])
            taken = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, taken)
            ended = ends.any(dim=1).cpu()
        taken = taken.cpu().where(self.running, 0)
        rows, columns = (place.cpu() < taken[:, None]).nonzero(as_tuple=True)
        self.text[rows, self.lengths[rows] + columns] = new[rows, columns]
        self.lengths = self.lengths + taken
        self.running = self.running & ~ended & (self.lengths < self.end)
        return taken

    def new(self, time: int) -> Tensor:
        """What follows the first `time` tokens, `[batch, at most n]`; an ended row repeats its last token."""
        places = torch.arange(time, int(self.lengths.max())).minimum(self.lengths[:, None] - 1)
        return self.text.gather(1, places.to(self.text.device))


@dataclass(frozen=True)
class Draft:
    """Guesses of one round.

    Attributes:
        tokens: `[batch, guesses]`; there may be none.
        counts: `[batch]`, how many of them a row really puts to the target.
        probabilities: `[batch, guesses, vocabulary]` that they were drawn from; None if the drafter was certain of each.
    """

    tokens: Tensor
    counts: Tensor
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """What guesses, in one call of `decode`."""

    @property
    def calls(self) -> int:
        """Forwards of a draft model so far."""
        ...

    def propose(self, rows: Rows) -> Draft:
        """Guess what follows each row, at most `rows.room.max()` tokens."""
        ...


# From a draft and the target's logits `[batch, guesses + 1, vocabulary]`: how many guesses stand, and what follows them, `[batch]`.
Rule = Callable[[Draft, Tensor], tuple[Tensor, Tensor]]


class Reader:
    """A decoder with a cache of its own, that follows `Rows` and forgets what they did not keep.

    Args:
        model: the decoder.
        padding: `[batch]` of the prompts.
        length: of the longest text to come.
    """

    def __init__(self, model: Decoder, padding: Tensor | None, length: int) -> None:
        self.model, self.padding, self.cache, self.calls = model, padding, RaggedCache(length + SLACK), 0

    def read(self, rows: Rows, overlap: int, guesses: Tensor | None = None) -> Tensor:
        """Read what is new in the rows, then the guesses; hidden states `[batch, time, d_model]` of all that was read.

        Args:
            rows: the first time, all of their text is read.
            overlap: tokens at a row's end that are read (again), 1 or more, and enough to reach back to what was kept.
            guesses: `[batch, guesses]`.
        """
        if self.cache.length == 0:
            new = rows.text[:, : int(rows.lengths[0])]
        else:
            self.cache.truncate(rows.lengths - overlap)
            new = rows.last(overlap)
        return self.go_on(new if guesses is None else torch.cat((new, guesses), dim=1))

    def go_on(self, tokens: Tensor) -> Tensor:
        """Read tokens `[batch, time]` behind all that was read; hidden states `[batch, time, d_model]`."""
        self.calls += 1
        return self.model.hidden(tokens, self.cache, self.cache.shifted(self.padding))


@torch.no_grad()
def draft_and_verify(
    target: Decoder,
    tokens: Tensor,
    n: int,
    drafter: Drafter,
    rule: Rule,
    *,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    reader: Reader | None = None,
) -> Decoded:
    """Continue prompts by up to n tokens; arguments as in `protocol.Decoding.decode`, checked before.

    A drafter that shares the target's cache brings the `reader` that holds it, new; the next round's reading cuts off what
    it left there.
    """
    time = tokens.shape[1]
    rows, reader = Rows.begin(tokens, n, stop), reader or Reader(target, padding, time + n)
    rounds, drafted, accepted, rejected = torch.zeros(4, len(tokens), dtype=torch.int64)
    while bool(rows.running.any()):
        ran, draft = rows.running, drafter.propose(rows)
        draft = Draft(draft.tokens, draft.counts.minimum(rows.room.to(tokens.device)), draft.probabilities)
        hidden = reader.read(rows, 1, draft.tokens)[:, -draft.tokens.shape[1] - 1 :]
        kept, following = rule(draft, target.logits(hidden))
        taken = rows.append(draft.tokens, kept, following)
        counts, stand = draft.counts.cpu(), kept.cpu()
        rounds += ran
        drafted += counts  # of ended rows, which have no room: 0
        accepted += taken.minimum(stand)
        rejected += (stand < counts) & (taken > stand)
    return Decoded(
        tokens=rows.new(time),
        target_calls=reader.calls,
        draft_calls=drafter.calls,
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        rejected=rejected,
    )


def expected_tokens(alpha: float, gamma: float) -> float:
    r"""Tokens a target call, $E = (1 - \alpha^{\gamma + 1}) / (1 - \alpha)$ (Eq. 1).

    Args:
        alpha: mean share of guesses that are accepted, 0 to 1, each independent of the others.
        gamma: guesses a round.

    Examples:
        >>> round(expected_tokens(0.8, 5), 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
        (3.69, 5.0, 1.0)
    """
    return (1 - alpha ** (gamma + 1)) / (1 - alpha) if alpha < 1 else gamma + 1.0


def expected_speedup(alpha: float, gamma: float, cost: float) -> float:
    r"""Factor by which time shrinks, $E / (\gamma c + 1)$ (Theorem 3.8), if a target call takes as long over more tokens.

    Args:
        alpha: as in `expected_tokens`.
        gamma: guesses a round.
        cost: $c$, time of a draft call over that of a target call.

    Examples:
        >>> round(expected_speedup(0.8, 5, 0.02), 2)
        3.35
    """
    return expected_tokens(alpha, gamma) / (gamma * cost + 1)
