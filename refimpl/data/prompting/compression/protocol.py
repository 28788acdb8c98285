r"""What all methods share that shorten a prompt by leaving tokens out.

Glossary
    prompt      a text that a model will read
    n           its tokens, by that model's tokenizer and without special tokens
    budget      tokens kept of them
    rate        budget / n, the papers' $\tau$
    kept        positions of the tokens that stay, ascending
    priority    `[n]`, tokens with larger values stay longer

A method is a frozen configuration; `method.compressor(tokenizer, model)` makes what is called on texts: it answers which tokens of
the reader's stay, so that whatever it returns was in the prompt, in that order. The budget is met to the token: where methods judge
words, the last word that fits in part is kept in part. `question_aware` says whether a method looks at the question; one that does
not is passed it all the same.

Invariants, run for every method by `tests/data/prompting/compression/test_protocol.py`: a budget of n or more is the identity; any
smaller one is met exactly, so that nothing is rounded to nothing and a short prompt is not emptied; what is kept is part of the
prompt in its order; the same prompt gives the same result whatever was compressed before; several prompts together give what each
gives alone; the question changes nothing unless `question_aware`.

Not here: methods that pack a prompt into trained vectors, which are no part of the text.

Examples:
    >>> most(torch.tensor([0.1, 0.7, 0.2, 0.7]), 3).tolist(), portions([10, 5, 1], 8)
    ([1, 2, 3], [5, 2, 1])
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Protocol

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from refimpl.model.model import Decoder


class PromptMethod(Protocol):
    """A method's configuration."""

    question_aware: ClassVar[bool]

    def compressor(self, tokenizer: Tokenizer, model: Decoder | None = None) -> "Compressor":
        """What compresses prompts.

        Args:
            tokenizer: of the model that will read what is kept.
            model: a causal model with this tokenizer, for methods that ask one; the device is its, or the CPU.

        Raises:
            ValueError: the method asks a model and got none.
        """
        ...


@dataclass(frozen=True)
class Compressed:
    """A prompt and what is kept of it.

    Attributes:
        tokens: `[n]`, int64, the whole prompt.
        kept: `[budget or n]`, int64, ascending positions in it.
    """

    tokens: Tensor
    kept: Tensor

    @property
    def ids(self) -> Tensor:
        """The tokens that stay, `[budget or n]`."""
        return self.tokens[self.kept]


class Compressor(ABC):
    """Calls a method on texts; a method writes `positions`.

    Args:
        tokenizer: of the model that will read what is kept.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def compress(
        self, texts: Sequence[str], budgets: Sequence[int], questions: Sequence[str] | None = None
    ) -> list[Compressed]:
        """Shorten prompts, each to its own budget.

        Args:
            texts: the prompts; an empty one stays empty.
            budgets: tokens to keep of each, 1 or more.
            questions: what will be asked of each, where it is known.

        Returns:
            In the order of the texts, on the CPU.

        Raises:
            ValueError: a budget below 1, or as many budgets or questions as there are no texts.
        """
        questions = [""] * len(texts) if questions is None else questions
        if not len(texts) == len(budgets) == len(questions):
            raise ValueError(
                f"{len(texts)} texts need as many budgets ({len(budgets)}) and questions ({len(questions)})"
            )
        for budget in budgets:
            if budget < 1:
                raise ValueError(f"budget={budget} must be at least 1 token; a prompt is never emptied")
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        whole = [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings]
        kept = [torch.arange(len(tokens)) for tokens in whole]
        long = [i for i, tokens in enumerate(whole) if len(tokens) > budgets[i]]
        if long:
            chosen = self.positions(
                [texts[i] for i in long],
                [encodings[i] for i in long],
                [budgets[i] for i in long],
                [questions[i] for i in long],
            )
            for i, positions in zip(long, chosen, strict=True):
                kept[i] = positions
        return [Compressed(tokens, positions) for tokens, positions in zip(whole, kept, strict=True)]

    @abstractmethod
    def positions(
        self, texts: Sequence[str], encodings: Sequence[Encoding], budgets: Sequence[int], questions: Sequence[str]
    ) -> list[Tensor]:
        """Positions to keep, of prompts that all have more tokens than their budgets.

        Args:
            texts: the prompts.
            encodings: their tokens, with places in the text.
            budgets: tokens to keep of each.
            questions: of each, may be empty.

        Returns:
            For each `[budget]`, int64, ascending, on the CPU.
        """


def most(priority: Tensor, budget: int) -> Tensor:
    """Positions of the `budget` largest, `[budget or n]`, int64, ascending; of equals the earlier stays.

    Args:
        priority: `[n]`.
        budget: how many, 0 or more.
    """
    return priority.argsort(descending=True, stable=True)[:budget].sort().values


def portions(lengths: Sequence[int], budget: int) -> list[int]:
    """A budget divided over parts of a prompt by their lengths: whole numbers that add up to it, none above its length.

    Args:
        lengths: tokens of each part.
        budget: at most their sum.

    Examples:
        >>> portions([3, 3, 3], 4), portions([3, 3, 3], 9)
        ([1, 1, 2], [3, 3, 3])
    """
    total = sum(lengths)
    until = [budget * end // total if total else 0 for end in accumulate(lengths, initial=0)]
    return [end - start for start, end in pairwise(until)]
