r"""The loop of all methods that guess a chain of tokens and let the target check it in one call.

A method brings a drafter, which guesses, and a rule, which says how many guesses stand and what follows them. The loop keeps the
rows: each ends at its own stop token or after n tokens, and in each round takes as many tokens as were accepted in it
(`RaggedCache`). A row that has ended is read on with the others, as in `refimpl.model.generate`; nothing is taken from it.

Source: `speculative-decoding` (arXiv 2211.17192), Section 2; there for a single row.

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


class Tally:
    """What became of each round's guesses."""

    def __init__(self) -> None:
        self._widths: list[int] = []
        self._rounds: list[Tensor] = []

    def add(self, ran: Tensor, width: int, drafted: Tensor, depth: Tensor, stood: Tensor, refused: Tensor) -> None:
        """Take in a round, of each row `[batch]` on the CPU.

        Args:
            ran: whether it was in the round; if not, the others are 0.
            width: tokens of a row that the target read.
            drafted: guesses.
            depth: of them.
            stood: those that are in the output.
            refused: whether one was replaced.
        """
        self._widths.append(width)
        self._rounds.append(torch.stack((ran.long(), drafted, depth, stood, refused.long())))

    def decoded(self, tokens: Tensor, draft_calls: int) -> Decoded:
        """What was decoded, with its counts."""
        ran, drafted, depths, stood, refused = torch.stack(self._rounds, dim=2)  # [b, calls] each
        return Decoded(
            tokens=tokens,
            target_calls=len(self._widths),
            draft_calls=draft_calls,
            rounds=ran.sum(dim=1),
            drafted=drafted.sum(dim=1),
            rejected=refused.sum(dim=1),
            widths=torch.tensor(self._widths),
            depths=depths,
            stood=stood,
        )


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
    tally = Tally()
    while bool(rows.running.any()):
        ran, draft = rows.running, _cut(drafter.propose(rows), rows.room.to(tokens.device))
        hidden = reader.read(rows, 1, draft.tokens)[:, -draft.tokens.shape[1] - 1 :]
        kept, following = rule(draft, target.logits(hidden))
        taken = rows.append(draft.tokens, kept, following)
        counts, stand = draft.counts.cpu(), kept.cpu()
        refused = (stand < counts) & (taken > stand)
        tally.add(ran, draft.tokens.shape[1] + 1, counts, counts, taken.minimum(stand), refused)
    return tally.decoded(rows.new(time), drafter.calls)


def _cut(draft: Draft, room: Tensor) -> Draft:
    """No more guesses of a row than it has room for, and no column that is a guess of none: the target need not read it."""
    counts = draft.counts.minimum(room)
    most = int(counts.max())
    chances = draft.probabilities
    return Draft(draft.tokens[:, :most], counts, None if chances is None else chances[:, :most])
