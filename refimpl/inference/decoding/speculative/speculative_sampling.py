r"""Speculative sampling: a small model guesses, the target checks all guesses in one call, its distribution stays as it is.

Source: `speculative-decoding` (arXiv 2211.17192), Algorithm 1, Sections 2.2, 2.3 and 3; `speculative-sampling` (arXiv 2302.01318),
Algorithm 2 and Theorem 1, is the same rule found independently. Neither came with code; compared with transformers 5.23.0,
`_speculative_sampling` in generation/utils.py.

Differs from the paper: batches (there a single row; see `draft_and_verify`); a draft ends where all rows have guessed a stop
token, and no guess behind one is put to the target; where rounding leaves nothing of p - q, the replacement is drawn from p.
In a round's first draft call the last two tokens are read, since after a round in which all was accepted the draft model has not
seen its own last guess.

Not here: a draft length that adapts; top-k and top-p (truncate both distributions alike and the rule stays exact); beams; the
lenient rule of Appendix A.5. Tokens equal those of plain decoding up to rounding: where two logits agree to the last bits, another
number of tokens in a call can decide between them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.draft_and_verify import Draft, Reader, Rows, draft_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding
from refimpl.model.generate import check_arguments, probabilities
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class SpeculativeSampling(Decoding):
    r"""Guesses of a draft model, checked by modified rejection sampling.

    Args:
        gamma: guesses a round, $\gamma$ (Leviathan) or K (Chen); 4 is Chen's for Chinchilla.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> target = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> decoded = SpeculativeSampling().decode(target, torch.tensor([[5, 7, 33]]), 10, draft=target)
        >>> decoded.target_calls, decoded.acceptance  # the target guesses for itself: 5 tokens a call
        (2, 1.0)
    """

    gamma: int = 4

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise ValueError(f"gamma={self.gamma} must be at least 1; without guesses it is plain decoding")

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
            draft: a decoder with the same vocabulary: the same tokens under the same numbers, of which only the count can be
                checked here.
            temperature: of both models; 0 is greedy.
            generator: source of the draws, on the models' device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range; no draft, or one with another vocabulary.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        drafter = DraftModel(_fitting(draft, target), self.gamma, temperature, generator, padding, tokens.shape[1] + n)
        rule = (
            accept_greedy if temperature == 0 else partial(accept_sampled, temperature=temperature, generator=generator)
        )
        return draft_and_verify(target, tokens, n, drafter, rule, stop=stop, padding=padding)


class DraftModel:
    """A decoder that guesses token by token.

    Args:
        model: the draft model.
        gamma: guesses a round.
        temperature: 0 guesses the likeliest token, above 0 draws.
        generator: source of the draws.
        padding: of the prompts.
        length: of the longest text to come.
    """

    def __init__(
        self,
        model: Decoder,
        gamma: int,
        temperature: float,
        generator: torch.Generator | None,
        padding: Tensor | None,
        length: int,
    ) -> None:
        self.gamma, self.temperature, self.generator = gamma, temperature, generator
        self.reader = Reader(model, padding, length)

    @property
    def calls(self) -> int:
        """Forwards so far."""
        return self.reader.calls

    def propose(self, rows: Rows) -> Draft:
        """Guess what follows each row."""
        guesses: list[Tensor] = []
        drawn_from: list[Tensor] = []
        going = rows.running.to(rows.text.device, copy=True)
        counts = torch.zeros(len(rows.text), dtype=torch.int64, device=rows.text.device)
        for i in range(min(self.gamma, int(rows.room.max()))):
            hidden = self.reader.read(rows, 2) if i == 0 else self.reader.go_on(guesses[-1][:, None])
            logits = self.reader.model.logits(hidden[:, -1])
            if self.temperature == 0:
                guess = logits.argmax(dim=-1)
            else:
                drawn_from.append(probabilities(logits, self.temperature))
                guess = torch.multinomial(drawn_from[-1], 1, generator=self.generator).squeeze(1)
            guesses.append(guess)
            counts += going
            if rows.stops is not None:
                going &= ~torch.isin(guess, rows.stops)
                if not bool(going.any()):
                    break
        if not guesses:
            return Draft(rows.text[:, :0], counts)
        return Draft(torch.stack(guesses, dim=1), counts, torch.stack(drawn_from, dim=1) if drawn_from else None)


def accept_greedy(draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rule at temperature 0: guesses stand up to the first that is not the target's own choice.

    Args:
        draft: guesses.
        logits: `[batch, guesses + 1, vocabulary]` of the target, after the last token and after each guess.

    Returns:
        How many guesses stand, and the token that follows them: `[batch]` each.
    """
    best = logits.argmax(dim=-1)
    kept = _leading(draft.tokens == best[:, :-1], draft.counts)
    return kept, best.gather(1, kept[:, None]).squeeze(1)


def accept_sampled(
    draft: Draft, logits: Tensor, *, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    r"""The rule above temperature 0 (Algorithm 1): keep a guess x with probability $\min(1, p(x)/q(x))$.

    At the first that is not kept, a token is drawn from what q lacks of p; behind the last guess, one is drawn from p.

    Args:
        draft: guesses, and what they were drawn from; None means that each was certain, q(x) = 1.
        logits: `[batch, guesses + 1, vocabulary]` of the target, after the last token and after each guess.
        temperature: of the target, above 0.
        generator: source of the draws.

    Returns:
        How many guesses stand, and the token that follows them: `[batch]` each.
    """
    p_target, guess = probabilities(logits, temperature), draft.tokens[..., None]
    q_draft = draft.probabilities
    if q_draft is None:
        q_draft = torch.zeros_like(p_target[:, :-1]).scatter_(2, guess, 1.0)
    p_guess, q_guess = p_target[:, :-1].gather(2, guess).squeeze(2), q_draft.gather(2, guess).squeeze(2)
    uniform = torch.rand(guess.shape[:2], generator=generator, device=logits.device)
    kept = _leading(uniform * q_guess < p_guess, draft.counts)
    row = torch.arange(len(kept), device=kept.device)
    at_end = kept == draft.counts
    q_next = torch.cat((q_draft, torch.zeros_like(p_target[:, :1])), dim=1)[row, kept]
    p_next = p_target[row, kept]
    weights = torch.where(at_end[:, None], p_next, residual(p_next, q_next))
    return kept, torch.multinomial(weights, 1, generator=generator).squeeze(1)


def residual(p_target: Tensor, q_draft: Tensor) -> Tensor:
    r"""What a replaced guess is drawn from: $\max(0, p - q)$, normalized (Section 2.3), or p where that is 0 everywhere.

    Args:
        p_target: `[..., vocabulary]`.
        q_draft: the same shape.

    Returns:
        `[..., vocabulary]`.

    Examples:
        >>> residual(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.375, 0.125, 0.5])).tolist()
        [0.25, 0.75, 0.0]
    """
    lacking = (p_target - q_draft).clamp(min=0)
    total = lacking.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, lacking / total.clamp(min=torch.finfo(total.dtype).tiny), p_target)


def acceptance(p_target: Tensor, q_draft: Tensor) -> Tensor:
    r"""Probability that a guess is kept, $\sum_x \min(p(x), q(x))$ (Lemma 3.3, Theorem 3.5): `[..., vocabulary]` to `[...]`.

    Examples:
        >>> acceptance(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.0, 0.75])).item()
        0.25
    """
    return torch.minimum(p_target, q_draft).sum(dim=-1)


def _leading(passed: Tensor, counts: Tensor) -> Tensor:
    """How many guesses passed before the first that did not, `[batch]`, of the first `counts` `[batch]` of each row."""
    place = torch.arange(passed.shape[1], device=passed.device)
    return (passed & (place < counts[:, None])).long().cumprod(dim=1).sum(dim=1)


def _fitting(draft: nn.Module | None, target: Decoder) -> Decoder:
    if not isinstance(draft, Decoder):
        raise ValueError(
            f"draft={type(draft).__name__} must be a refimpl.model Decoder with the target's vocabulary; prompt-lookup needs none"
        )
    ours, theirs = draft.config.vocabulary, target.config.vocabulary
    if ours != theirs:
        raise ValueError(
            f"the draft's vocabulary has {ours} tokens and the target's {theirs}: both must have the same; take a draft of the "
            "same family, or a method that needs none, such as prompt-lookup"
        )
    return draft
