r"""What all ways of decoding share.

Glossary
    target       the model whose text is wanted, `refimpl.model.model.Decoder`
    draft        what guesses: a smaller decoder with the target's vocabulary, or what `prepare` made; nothing for some methods
    guess        a drafted token, which the target has yet to check
    target call  one forward of the target, over however many tokens; the prompt's counts too
    round        guesses and the target call that checks them; a row is in a round if it had not ended before it
    depth        of a round: guesses one behind another, all of a chain, or a tree's longest branch
    accepted     guesses that stand in the output
    rejected     guesses that the target replaced; those behind one are neither
    row          a prompt of the batch; rows go on at their own pace

A method is a configuration; all that lives from call to call is made inside `decode`:

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import initialize_
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> target = initialize_(Decoder(config), torch.Generator().manual_seed(0))
    >>> decoded = Plain().decode(target, torch.tensor([[5, 7, 33]]), 4)
    >>> decoded.tokens.shape, decoded.target_calls
    (torch.Size([1, 4]), 4)

Invariants, run for every method by `tests/inference/decoding/test_protocol.py`: greedy tokens are those of
`refimpl.model.generate`, alone and in padded batches, with and without stop tokens; n is reached exactly; a call of the target
gives a token at least; the same seed gives the same tokens; nothing of one call is left for the next; inputs are not written.
Where the facet `exact` is true, drawn tokens follow the target's own distribution.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.model.generate import generate
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What `decode` returns.

    Attributes:
        tokens: `[batch, at most n]`, the new tokens as `refimpl.model.generate` returns them.
        target_calls: forwards of the target.
        draft_calls: forwards of a draft model, or of the heads that guess.
        rounds: `[batch]`, target calls before each row's end.
        drafted: `[batch]`, guesses that were put to the target.
        rejected: `[batch]`, of these, those that were replaced; of siblings, all of which were, one counts.
        widths: `[target_calls]`, tokens of a row that each call read from its last known one on, guesses or not; the prompt, which
            the first call reads as well, does not count.
        depths: `[batch, target_calls]`, each round's depth; 0 where a row had ended.
        stood: `[batch, target_calls]`, guesses of each round in the output.
    """

    tokens: Tensor
    target_calls: int
    draft_calls: int
    rounds: Tensor
    drafted: Tensor
    rejected: Tensor
    widths: Tensor
    depths: Tensor
    stood: Tensor

    @property
    def accepted(self) -> Tensor:
        """`[batch]`, guesses in the output."""
        return self.stood.sum(dim=1)

    @property
    def acceptance(self) -> float:
        r"""Share of the guesses that the target judged and kept: an estimate of $\alpha$; 0 if there was none."""
        accepted, judged = int(self.accepted.sum()), int((self.accepted + self.rejected).sum())
        return accepted / judged if judged else 0.0


class Decoding(ABC):
    """A method: a frozen dataclass of settings."""

    def prepare(
        self,
        target: Decoder,  # noqa: ARG002 - for those that train or search, as the next two
        draft: Decoder | None,
        text: Tensor,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> nn.Module | None:
        """What guesses for this target, to be passed as `draft`: made once, before any decoding.

        Args:
            target: left as it is.
            draft: a small model with the target's vocabulary, if there is one.
            text: `[time]` tokens, to train heads on or to search layers with.
            generator: source of randomness, on the CPU whatever the model's device.

        Returns:
            The small model, unless the method makes its own.
        """
        return draft

    @abstractmethod
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
        """Continue prompts by up to n tokens; arguments are those of `refimpl.model.generate`, and `draft`.

        Raises:
            ValueError: an argument outside its range, or a draft that does not fit.
        """


def check_text(target: Decoder, text: Tensor) -> None:
    """Check the tokens that a method trains or searches on.

    Raises:
        ValueError: not `[time]` whole numbers, or a token outside the vocabulary.
    """
    if text.ndim != 1 or text.is_floating_point():
        raise ValueError(f"text of shape {tuple(text.shape)} and {text.dtype} must be [time] whole numbers")
    low, high = (int(x) for x in text.aminmax()) if len(text) else (0, 0)
    if low < 0 or high >= target.config.vocabulary:
        raise ValueError(f"text ranges from {low} to {high}, the vocabulary from 0 to {target.config.vocabulary - 1}")


@dataclass(frozen=True)
class Plain(Decoding):
    """One call of the target for each token: what others are held against."""

    def decode(
        self,
        target: Decoder,
        tokens: Tensor,
        n: int,
        *,
        draft: nn.Module | None = None,  # noqa: ARG002 - nothing is guessed
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop: Collection[int] = (),
        padding: Tensor | None = None,
    ) -> Decoded:
        """Continue prompts by up to n tokens."""
        new = generate(target, tokens, n, temperature=temperature, generator=generator, stop=stop, padding=padding)
        going = torch.ones_like(new, dtype=torch.bool)
        if stop:
            ends = torch.isin(new, torch.tensor(sorted(stop), device=new.device))
            going = ends.cumsum(dim=1) - ends.long() == 0  # the token that ends a row is still its own
        none = torch.zeros(new.shape, dtype=torch.int64)
        return Decoded(
            tokens=new,
            target_calls=new.shape[1],
            draft_calls=0,
            rounds=going.sum(dim=1).cpu(),
            drafted=none[:, 0],
            rejected=none[:, 0],
            widths=torch.ones(new.shape[1], dtype=torch.int64),
            depths=none,
            stood=none,
        )
