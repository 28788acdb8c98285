"""What all data selection methods share.

Glossary
    examples     texts of the raw corpus, any of them may be empty
    k            how many are wanted
    target       texts of the kind that is wanted; a method that has another signal ignores them
    generator    the source of everything random

A method is a configuration that is called on examples, and answers which to keep:

Examples:
    >>> generator = torch.Generator().manual_seed(0)
    >>> RandomSelection()(["a", "b", "c", "d"], 2, ["a"], generator).shape
    torch.Size([2])

Invariants, run for every method by `tests/data/selection/test_protocol.py`: exactly k indices, ascending, none twice; k = all is
everything; k below 1 or above all is refused; the same generator's state gives the same indices; empty texts are examples like
others; the examples are left as they were.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Selection(ABC):
    """A method: a frozen dataclass of settings that is called on examples."""

    @abstractmethod
    def __call__(self, examples: Sequence[str], k: int, target: Sequence[str], generator: torch.Generator) -> Tensor:
        """Choose: `[k]` indices into the examples, int64, ascending.

        Raises:
            ValueError: k is below 1 or above the number of examples (`check_k`), or the target says nothing.
        """


@dataclass(frozen=True)
class RandomSelection(Selection):
    """Any k examples, all equally likely: what others are held against."""

    def __call__(self, examples: Sequence[str], k: int, target: Sequence[str], generator: torch.Generator) -> Tensor:  # noqa: ARG002 - the protocol passes it
        """Choose."""
        check_k(k, len(examples))
        return torch.randperm(len(examples), generator=generator)[:k].sort().values


def check_k(k: int, n: int) -> None:
    """Check a number of examples to keep.

    Raises:
        ValueError: below 1, or more than there are.

    Examples:
        >>> check_k(5, 4)
        Traceback (most recent call last):
        ValueError: k=5 must be 1 to 4, the number of examples
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be 1 to {n}, the number of examples")
