r"""Self-speculative decoding (Draft & Verify): the target without some of its sub-layers guesses, and the whole of it checks.

Which attention and feed-forward sub-layers are left out is searched for once, by decoding and Bayesian optimization. The draft
reads the text from the target's own cache, and a round's guesses end where the draft is unsure.

Source: `draft-and-verify` (arXiv 2309.08168), the sections on selecting skipped layers and on adaptive draft exits; official code
dilab-zju/self-speculative-decoding@688db8b: decoding.py, `self_speculative_sample`; searching.py; at most 12 guesses, a first
threshold of 0.6 and a goal of 0.9 as in evaluate_sum.ipynb.

Differs from the paper: batches, each row with a threshold of its own, which begins anew with every call (the notebook hands it
on to the next text). The search tries 16 sets on 16 tokens of 4 prompts (1,000, 32 and 8 there), each set once, with the settings
that decoding has (there 8 guesses and a first threshold of 0.8); see `bayesian_search`. It begins with nothing left out, so that what
it finds is no slower than that (search.ipynb begins with two sets known to be good). It looks for the most tokens for a reading of
all of the target's weights, which is what takes the time where weights come from memory, and repeats exactly; `measure="seconds"` is
the paper's.

Not here: sets of one's own to begin the search with; top-k and top-p.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.bayesian_search import maximize
from refimpl.inference.decoding.draft_and_verify import Draft, Reader, Rows, Rule, draft_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding, check_text
from refimpl.inference.decoding.speculative.speculative_sampling import accept_greedy, accept_sampled
from refimpl.inference.decoding.speculative.thinned import Thinned
from refimpl.model.generate import check_arguments, probabilities
from refimpl.model.model import Decoder

PROMPTS, PROMPT, NEW = 4, 64, 16  # of the search: texts, their tokens, tokens decoded; ours
RATE, MEMORY, INERTIA = 0.01, 0.5, 0.9  # of the threshold: the paper's epsilon, beta_1, beta_2


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Decoding):
    r"""Guesses of the target's own layers, some left out, checked by all of them.

    Args:
        guesses: the most guesses of a round, K.
        threshold: probability of a guess below which it is the round's last, $\gamma$, at first.
        goal: share of guesses to be accepted, $\alpha$, that the threshold is led by; None leaves it as it is.
        trials: sets of sub-layers that the search tries; ours.
        measure: what the search counts as cost, `weights` read or `seconds` of this machine; ours.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> target = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> method = SelfSpeculative(threshold=0.0, goal=None)  # never unsure
        >>> whole = Thinned(target, torch.zeros(2, 2))  # nothing is left out
        >>> method.decode(target, torch.tensor([[5, 7, 33]]), 14, draft=whole).target_calls  # 1 token, then 12 guesses and 1
        2
    """

    guesses: int = 12
    threshold: float = 0.6
    goal: float | None = 0.9
    trials: int = 16
    measure: Literal["weights", "seconds"] = "weights"

    def __post_init__(self) -> None:
        for name in ("guesses", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, value in (("threshold", self.threshold), ("goal", self.goal)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a share, and must be in [0, 1]")
        if self.measure not in ("weights", "seconds"):
            raise ValueError(f"measure={self.measure!r} must be 'weights' or 'seconds'")

    def prepare(
        self,
        target: Decoder,
        draft: Decoder | None,  # noqa: ARG002 - the target's own layers draft
        text: Tensor,
        generator: torch.Generator,
    ) -> Thinned:
        """The target without the sub-layers whose absence makes decoding of this text fastest.

        Args:
            target: left as it is; what is returned holds its layers themselves.
            draft: not used.
            text: `[time]` tokens, more than 64, to draw prompts from.
            generator: source of prompts and of the search, on the CPU.

        Raises:
            ValueError: too short a text, or tokens that the target does not have.
        """
        check_text(target, text)
        if len(text) <= PROMPT:
            raise ValueError(f"a text of {len(text)} tokens is too short: it must have more than {PROMPT}")
        starts = torch.randint(len(text) - PROMPT, (PROMPTS, 1), generator=generator)
        prompts = text[starts + torch.arange(PROMPT)].to(target.embedding.weight.device)
        layers = target.config.n_layers

        def value(skipped: Tensor) -> float:
            return self._speed(target, Thinned(target, skipped.view(2, layers)), prompts)

        nothing = torch.zeros(2 * layers, dtype=torch.bool)
        best, _ = maximize(value, 2 * layers, self.trials, generator, first=nothing)
        return Thinned(target, best.view(2, layers))

    def _speed(self, target: Decoder, thinned: Thinned, prompts: Tensor) -> float:
        """Tokens of greedy decoding, over what they cost: readings of all weights, or seconds, one text at a time."""
        if self.measure == "seconds":
            begin = time.perf_counter()
            for prompt in prompts:
                self.decode(target, prompt[None], NEW, draft=thinned).tokens.tolist()
            return prompts.shape[0] * NEW / (time.perf_counter() - begin)
        decoded = self.decode(target, prompts, NEW, draft=thinned)
        return decoded.tokens.numel() / float((decoded.drafted * thinned.cost + decoded.rounds).sum())

    def decode(
        self,
        target: Decoder,
        tokens: Tensor,
        n: int,
        *,
        draft: nn.Module | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop: Collection[int] = (),
        padding: Tensor | None = None,
    ) -> Decoded:
        """Continue prompts by up to n tokens; see `protocol.Decoding.decode`.

        Args:
            target: the model whose distribution the tokens follow.
            tokens: `[batch, time]`, the prompts, padded at the left.
            n: new tokens, 1 or more.
            draft: what `prepare` made of this target, or a `Thinned` of one's own choice.
            temperature: of target and draft; 0 is greedy.
            generator: source of the draws, on the model's device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range; no draft, or one of another target.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        if not isinstance(draft, Thinned) or draft.embedding is not target.embedding:
            raise ValueError(
                f"draft={type(draft).__name__} must be this target without some sub-layers: pass what `prepare` made"
            )
        reader = Reader(target, padding, tokens.shape[1] + n)
        rule: Rule = accept_greedy
        if temperature > 0:
            rule = partial(accept_sampled, temperature=temperature, generator=generator)
        drafter = _UnsureDrafter(self, draft, reader, len(tokens), temperature, generator)
        return draft_and_verify(target, tokens, n, drafter, rule, stop=stop, padding=padding, reader=reader)


class _UnsureDrafter:
    """Guesses with the thinned target, in the target's cache, as long as it is sure.

    Args:
        settings: of the method.
        model: the thinned target.
        reader: the target's; what is read into its cache here is cut off by its next reading.
        batch: rows.
        temperature: 0 guesses the likeliest token, above 0 draws.
        generator: source of the draws.
    """

    def __init__(
        self,
        settings: SelfSpeculative,
        model: Thinned,
        reader: Reader,
        batch: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> None:
        self.settings, self.model, self.reader, self.calls = settings, model, reader, 0
        self.temperature, self.generator = temperature, generator
        self.threshold = torch.full((batch,), settings.threshold)
        self.accepted_share = torch.zeros(batch)
        self.before: tuple[Tensor, Tensor] | None = None  # lengths and guesses of the last round

    def propose(self, rows: Rows) -> Draft:
        """Guess what follows each row."""
        counts = torch.zeros_like(rows.lengths)
        if self.reader.cache.length == 0:  # the prompt is yet to be read
            return Draft(rows.text[:, :0], counts.to(rows.text.device))
        if self.before is not None and self.settings.goal is not None:
            accepted = rows.lengths - self.before[0] - 1
            self.threshold, self.accepted_share = adapt(
                self.threshold,
                self.accepted_share,
                accepted,
                *self.before[1:],
                self.settings.guesses,
                self.settings.goal,
            )
        self.reader.cache.truncate(rows.lengths - 1)
        guesses: list[Tensor] = []
        drawn_from: list[Tensor] = []
        going = rows.running.clone()
        for _ in range(min(self.settings.guesses, int(rows.room.max()))):
            logits = self._read(guesses[-1][:, None] if guesses else rows.last(1))
            if self.temperature == 0:
                guess = logits.argmax(dim=-1)
            else:
                drawn_from.append(probabilities(logits, self.temperature))
                guess = torch.multinomial(drawn_from[-1], 1, generator=self.generator).squeeze(1)
            guesses.append(guess)
            counts += going
            sure = probabilities(logits, 1.0).gather(1, guess[:, None]).squeeze(1)
            going &= (sure >= self.threshold.to(sure)).cpu()
            if rows.stops is not None:
                going &= ~torch.isin(guess, rows.stops).cpu()
            if not bool(going.any()):
                break
        self.before = rows.lengths, counts.minimum(rows.room)
        tokens = torch.stack(guesses, dim=1) if guesses else rows.text[:, :0]
        return Draft(tokens, counts.to(tokens.device), torch.stack(drawn_from, dim=1) if drawn_from else None)

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` after tokens `[batch, 1]`, which stay in the target's cache, in the layers that are kept."""
        self.calls += 1
        cache = self.reader.cache
        return self.model.logits(self.model.hidden(tokens, cache, cache.shifted(self.reader.padding))[:, -1])


def adapt(
    threshold: Tensor, share: Tensor, accepted: Tensor, drafted: Tensor, most: int, goal: float
) -> tuple[Tensor, Tensor]:
    r"""The threshold after a round, and the running share of accepted guesses, of each row.

    With the round's share $a$: $A \leftarrow \beta_1 A + (1 - \beta_1)\,a$, then $\gamma \leftarrow \beta_2 \gamma + (1 -
    \beta_2)\,(\gamma \pm \epsilon)$, up where A is below the goal and down elsewhere, but not where the draft was as long as it
    may be.

    Args:
        threshold: $\gamma$, `[batch]`.
        share: $A$, `[batch]`; 0 at first.
        accepted: of the round's guesses, `[batch]`.
        drafted: the round's guesses, `[batch]`; a row without any stays as it is.
        most: guesses of a round at most.
        goal: $\alpha$.

    Examples:
        >>> round_ = torch.tensor([4, 12]), torch.tensor([4, 12])
        >>> adapt(torch.full((2,), 0.6), torch.ones(2), *round_, 12, 0.9)[0].tolist()
        [0.5990000367164612, 0.6000000238418579]
    """
    fresh = MEMORY * share + (1 - MEMORY) * accepted / drafted.clamp(min=1)
    step = torch.where(fresh < goal, RATE, torch.where(drafted == most, 0.0, -RATE))
    moved = INERTIA * threshold + (1 - INERTIA) * (threshold + step)
    return torch.where(drafted > 0, moved, threshold), torch.where(drafted > 0, fresh, share)
