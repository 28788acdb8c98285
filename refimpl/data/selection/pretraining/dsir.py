r"""DSIR: resample a raw corpus until it is distributed like a target, in hashed n-grams.

Source: `dsir` (arXiv 2302.03169): importance weights of bag-of-n-gram models, Gumbel top-k; official code
p-lambda/dsir@4802a1c71cdb1ae3c8367e20df64fe14da6d597d, `data_selection/hashed_ngram_dsir.py` and `base.py`.

Differs from the paper: its documents are cut into pieces of equal length before, which is left to the caller; words are split as
the official library does by default. Differs from that library: where fewer than k examples have `min_words`, shorter ones follow
them, by the same noised weights (the library fails); the raw model is fitted on all examples, not on the first $10^9$ n-grams.

Not here: several targets with proportions, files and processes, the paper's quality filter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.data.selection.ngrams import FLOOR, Hashed, hashed, shares
from refimpl.data.selection.protocol import Selection, check_k


@dataclass(frozen=True, kw_only=True)
class DSIR(Selection):
    """Data selection with importance resampling.

    Args:
        n: words of the longest n-gram.
        buckets: that n-grams are hashed into.
        min_words: examples of fewer words come last.
        smoothing: added to each of the target's counts; for a small target.
        noise: draw in proportion to the weights, without replacement; False takes the k largest.

    Examples:
        >>> raw = ["a b", "c d", "a a b", "d d", "c b"]
        >>> DSIR(min_words=0)(raw, 2, ["a b a", "b a"], torch.Generator().manual_seed(0)).tolist()
        [0, 2]
    """

    n: int = 2
    buckets: int = 10_000
    min_words: int = 100
    smoothing: float = 0.0
    noise: bool = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.buckets < 1:
            raise ValueError(f"n={self.n} and buckets={self.buckets} must be at least 1; the paper uses 2 and 10000")
        if self.min_words < 0 or self.smoothing < 0:
            raise ValueError(f"min_words={self.min_words} and smoothing={self.smoothing} must not be negative")

    def __call__(self, examples: Sequence[str], k: int, target: Sequence[str], generator: torch.Generator) -> Tensor:
        """Choose k examples; their texts alone decide, and the generator.

        Args:
            examples: the raw corpus; pieces of about equal length, since a weight grows with it.
            k: 1 to all.
            target: texts of the wanted kind, with one word at least.
            generator: source of the noise, on the CPU.

        Returns:
            `[k]` indices, int64, ascending.

        Raises:
            ValueError: k out of range, or a target without words.
        """
        check_k(k, len(examples))
        wanted, raw = hashed(target, self.n, self.buckets), hashed(examples, self.n, self.buckets)
        if not len(wanted.bucket):
            raise ValueError(f"target of {len(target)} texts has no word; there is nothing to resemble")
        weights = log_weights(raw, shares(wanted, self.buckets, self.smoothing), shares(raw, self.buckets))
        scores = gumbel(weights, generator) if self.noise else weights
        ranked = scores.argsort(descending=True, stable=True)
        long_first = (raw.words[ranked] < self.min_words).int().argsort(stable=True)
        return ranked[long_first][:k].sort().values


def log_weights(raw: Hashed, target_shares: Tensor, raw_shares: Tensor) -> Tensor:
    r"""Of each text $\log w = \sum_b z_b (\log \gamma^p_b - \log \gamma^q_b)$, `[texts]`, float64; 0 for an empty one.

    Args:
        raw: n-grams of the texts, whose counts by bucket are $z$.
        target_shares: $\gamma^p$, `[buckets]`.
        raw_shares: $\gamma^q$, `[buckets]`.
    """
    difference = (target_shares + FLOOR).log() - (raw_shares + FLOOR).log()
    return torch.zeros(len(raw.words), dtype=difference.dtype).index_add_(0, raw.text, difference[raw.bucket])


def gumbel(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    r"""Add independent Gumbel noise, $-\log E$ with $E$ exponential: the k largest sums are k draws without replacement.

    Args:
        log_weights: `[n]`, left unchanged.
        generator: source of the noise.
    """
    return log_weights - torch.empty_like(log_weights).exponential_(generator=generator).log()
