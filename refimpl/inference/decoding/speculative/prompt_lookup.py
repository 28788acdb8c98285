r"""Prompt lookup decoding: what followed the last few tokens when they stood in the text before is guessed to follow again.

Source: `prompt-lookup-decoding`; the method was published as code: apoorvumang/prompt-lookup-decoding@cada4fe,
`find_candidate_pred_tokens` in README.md, and `greedy_search_pld` in demo-pld.ipynb. Compared with transformers 5.23.0,
`PromptLookupCandidateGenerator`.

Differs from the paper: batches, in which left padding is no text (there a single row); where no earlier place matches, nothing
is guessed (there the token 100 is); drawn tokens too, by the rule of speculative sampling for a guess that was certain; a text
shorter than the longest n-gram is looked up by shorter ones (there it is an error). transformers takes the first place even
where fewer tokens follow than were asked for; here, as in the original, such a place counts as none.

Not here: a choice among several places, the first is taken; texts beside the prompt to look into.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.draft_and_verify import Draft, Rows, draft_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding
from refimpl.inference.decoding.speculative.speculative_sampling import accept_greedy, accept_sampled
from refimpl.model.generate import check_arguments
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Decoding):
    """Guesses copied from the text so far, checked by the target.

    Args:
        ngram: the most last tokens that are looked up; fewer where so many are not found.
        guesses: tokens copied from behind the place that was found.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> target = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> decoded = PromptLookup().decode(target, torch.tensor([[1, 2, 3]]), 60)  # greedy text of so small a model repeats
        >>> decoded.tokens.shape, decoded.target_calls < 30
        (torch.Size([1, 60]), True)
    """

    ngram: int = 3
    guesses: int = 10

    def __post_init__(self) -> None:
        for name in ("ngram", "guesses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token")

    def decode(
        self,
        target: Decoder,
        tokens: Tensor,
        n: int,
        *,
        draft: nn.Module | None = None,  # noqa: ARG002 - the text itself is the draft
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
            draft: not used.
            temperature: 0 is greedy.
            generator: source of the draws, on the model's device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        rule = (
            accept_greedy if temperature == 0 else partial(accept_sampled, temperature=temperature, generator=generator)
        )
        drafter = _Copier(self.ngram, self.guesses, padding)
        return draft_and_verify(target, tokens, n, drafter, rule, stop=stop, padding=padding)


class _Copier:
    """Guesses what stands behind an earlier place; a drafter without a model."""

    calls = 0

    def __init__(self, ngram: int, guesses: int, padding: Tensor | None) -> None:
        self.ngram, self.guesses, self.padding = ngram, guesses, padding

    def propose(self, rows: Rows) -> Draft:
        """Guess what follows each row."""
        text = rows.text[:, : int(rows.lengths.max())]
        found, start = lookup(text, rows.lengths, self.ngram, self.guesses, self.padding)
        places = start[:, None] + torch.arange(min(self.guesses, int(rows.room.max())), device=text.device)
        return Draft(rows.text.gather(1, places), found * self.guesses)


def lookup(
    text: Tensor, lengths: Tensor, ngram: int = 3, guesses: int = 10, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first place where the end of a row stood before, with enough behind it; longer ends are tried first.

    Args:
        text: `[batch, time]`; what follows a row's length means nothing.
        lengths: `[batch]`, left padding included.
        ngram: tokens of the end that is looked up first; then one fewer, down to 1.
        guesses: tokens that must follow the place within the row.
        padding: `[batch]`, tokens at the left that are no text.

    Returns:
        Whether there is such a place, and the index of the first token behind it (0 if there is none): `[batch]` each.

    Examples:
        >>> text = torch.tensor([[7, 1, 2, 5, 6, 1, 2], [7, 1, 2, 5, 6, 3, 4]])
        >>> lookup(text, torch.tensor([7, 7]), guesses=2)
        (tensor([ True, False]), tensor([3, 0]))
    """
    lengths = lengths.to(text.device)
    first = torch.zeros_like(lengths) if padding is None else padding.to(text.device)
    found, start = torch.zeros_like(lengths, dtype=torch.bool), torch.zeros_like(lengths)
    for size in range(min(ngram, text.shape[1]), 0, -1):
        end = text.gather(1, (lengths[:, None] - size + torch.arange(size, device=text.device)).clamp(min=0))
        same = (text.unfold(1, size, 1) == end[:, None]).all(dim=2)  # [b, places]
        place = torch.arange(same.shape[1], device=text.device)
        same &= (place >= first[:, None]) & (place + size + guesses <= lengths[:, None])
        # what is copied begins before the end itself, which is thus no place
        same &= place + size < lengths[:, None] - size
        here = same.any(dim=1) & ~found
        start = torch.where(here, same.int().argmax(dim=1) + size, start)
        found |= here
        if bool(found.all()):
            break
    return found, start
