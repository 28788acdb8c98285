r"""Texts as counts of hashed n-grams, and how far two corpora are apart in them.

Source: `dsir` (arXiv 2302.03169), hashed n-gram features and KL reduction; official code
p-lambda/dsir@4802a1c71cdb1ae3c8367e20df64fe14da6d597d, `data_selection/hashed_ngram_dsir.py`: a text in lower case is split into
runs of letters, digits and `_` and runs of other signs (nltk's WordPunct); an n-gram is its words with a space between; its
bucket is SHA-256 of its UTF-8, modulo the number of buckets.

Differs from the paper: the paper's experiments split words as nltk's `word_tokenize`; the official library's default is this one.
In the divergence a share below `FLOOR` counts as `FLOOR`'s addition leaves it, as in the library's weights.

Not here: stop words, counts by document kept densely.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-8  # added to a share before its logarithm
_WORDS = re.compile(r"\w+|[^\w\s]+")


class Hashed(NamedTuple):
    """N-grams of some texts: of each n-gram its text's number and its bucket, `[n-grams]`; of each text its words, `[texts]`."""

    text: Tensor
    bucket: Tensor
    words: Tensor


def words(text: str) -> list[str]:
    """A text in lower case, as words and runs of signs.

    Examples:
        >>> words("Don't  stop_it: x->y")
        ['don', "'", 't', 'stop_it', ':', 'x', '->', 'y']
    """
    return _WORDS.findall(text.lower())


def bucket(gram: str, buckets: int) -> int:
    """Bucket of one n-gram.

    Examples:
        >>> bucket("alice", 10000)
        6720
    """
    return int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets


def hashed(texts: Sequence[str], n: int = 2, buckets: int = 10_000) -> Hashed:
    """All n-grams of 1 to n words, none across two texts; each distinct one is hashed once.

    Raises:
        ValueError: n or buckets below 1.
    """
    if n < 1 or buckets < 1:
        raise ValueError(f"n={n} and buckets={buckets} must be at least 1; the paper uses 2 and 10000")
    vocabulary: dict[str, int] = {}
    split = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
    lengths = torch.tensor([len(ids) for ids in split], dtype=torch.int64)
    ids = torch.tensor([i for text in split for i in text], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(texts)), lengths)
    spelled = list(vocabulary)
    start, gram, grams = torch.arange(len(ids)), ids, spelled
    owners, found = [], []
    for order in range(1, n + 1):
        owners.append(owner[start])
        found.append(torch.tensor([bucket(text, buckets) for text in grams], dtype=torch.int64)[gram])
        fits = start + order < len(ids)
        start, gram = start[fits], gram[fits]
        same = owner[start] == owner[start + order]
        start, gram = start[same], gram[same]
        longer, gram = torch.unique(gram * len(spelled) + ids[start + order], return_inverse=True)
        grams = [f"{grams[code // len(spelled)]} {spelled[code % len(spelled)]}" for code in longer.tolist()]
    return Hashed(torch.cat(owners), torch.cat(found), lengths)


def shares(found: Hashed, buckets: int, smoothing: float = 0.0) -> Tensor:
    """Share of each bucket in all n-grams, `[buckets]`, float64; all equal where there are none.

    Args:
        found: n-grams.
        buckets: that they were hashed into.
        smoothing: added to each count.
    """
    counts = torch.bincount(found.bucket, minlength=buckets).double() + smoothing
    return counts / counts.sum() if counts.sum() else torch.full_like(counts, 1 / buckets)


def kl_reduction(target: Tensor, raw: Tensor, selected: Tensor) -> float:
    r"""How much nearer to the target a selection is than the raw corpus, $KL(p \| q) - KL(p \| p')$, in nats.

    Args:
        target: $p$, shares of the buckets.
        raw: $q$, the raw corpus's, which random selection keeps.
        selected: $p'$, the selection's.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> round(kl_reduction(p, q, p), 4)  # KL(p || q) = log(0.5 / 0.9) / 2 + log(0.5 / 0.1) / 2
        0.5108
    """
    return float((target * ((selected + FLOOR).log() - (raw + FLOOR).log())).sum())
