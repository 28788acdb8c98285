r"""Labels for every word of a text, from a text that a teacher made of it by leaving words out; and how far they can be trusted.

Source: `llmlingua-2` (arXiv 2403.12968), Algorithm 1 (data annotation) and Section 3, quality control; official code
microsoft/LLMLingua@e0e9d99beb94098bbd924aa53c2c112eac41c758, `experiments/llmlingua2/data_collection/label_word.py` and `filter.py`.

Differs from the paper: words match if they are equal in lower case, where the authors compare lemmas of a language-specific parser;
commas and line breaks are words like others. Differs from the code: pairs exactly at a percentile stay, since with a teacher that
seldom errs most rates are equal and all pairs would go; nothing compressed from nothing told has no foreign words.

Not here: the teacher.

Glossary
    original, compressed    words, $S_{ori}$ and $S_{comp}$
    variation rate          share of the compressed words that the original lacks, VR
    hitting rate            compressed words that the original has, over the original's words, HR
    matching rate           share of the original's words that are labelled, MR
    alignment gap           HR - MR, AG
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

WORD = re.compile(r"[^\S\n]*(?:\n|\w+|[^\w\s])|[^\S\n]+")


class Annotation(NamedTuple):
    """A text with its labels.

    Attributes:
        words: of the original; joined they are the text.
        labels: of each, whether the teacher kept it.
        variation_rate: share of the compressed words that the original lacks, 0 to 1.
        alignment_gap: share of the original's words that should have been found and were not, up to 1; below 0 it can't be.
    """

    words: list[str]
    labels: list[bool]
    variation_rate: float
    alignment_gap: float


def annotate(original: str, compressed: str, window: int = 150) -> Annotation:
    """Label the words of a text.

    Args:
        original: the text, not empty.
        compressed: what the teacher made of it.
        window: see `label`.

    Raises:
        ValueError: the original has no word.

    Examples:
        >>> found = annotate("The dog, it barked a lot.", "dog barked lot loudly")
        >>> "".join(w for w, kept in zip(found.words, found.labels) if kept), found.variation_rate, found.alignment_gap
        (' dog barked lot', 0.25, 0.0)
    """
    words = split(original)
    if not words:
        raise ValueError("original has no word; leave empty texts out")
    have, told = [folded(word) for word in words], [folded(word) for word in split(compressed)]
    labels = label(have, told, window)
    known = set(have)
    hits = sum(word in known for word in told)
    return Annotation(words, labels, 1 - hits / len(told) if told else 0.0, (hits - sum(labels)) / len(have))


def split(text: str) -> list[str]:
    r"""Words, single marks and line breaks, each with the spaces before it; joined they are the text.

    Examples:
        >>> split("def f(x_1):\n  pass")
        ['def', ' f', '(', 'x_1', ')', ':', '\n', '  pass']
    """
    return WORD.findall(text)


def folded(word: str) -> str:
    """What two words are compared by: lower case, without spaces around, but for a line break."""
    return word.strip().lower() or word[-1:]


def label(original: Sequence[str], compressed: Sequence[str], window: int = 150) -> list[bool]:
    """Find each compressed word in the original, near the one found before (Algorithm 1).

    The search looks at growing distances, forward first and then backward, takes words that are not labelled yet, and goes on from
    where it found one; forward by half a window at most, so that one wrong match does not lose the thread.

    Args:
        original: words as they are compared.
        compressed: likewise.
        window: distances that are tried, 0 to window - 1; 150 in the code, 1 or more.

    Returns:
        For each word of the original whether it was found.

    Raises:
        ValueError: window below 1.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1; the code uses 150")
    labels = [False] * len(original)
    last, at = len(original) - 1, 0
    known = set(original)
    for word in compressed:
        if word not in known:
            continue
        for distance in range(min(window, len(original))):
            forward, backward = min(at + distance, last), max(at - distance, 0)
            if original[forward] == word and not labels[forward]:
                labels[forward] = True
                at = min(forward, at + window // 2)
                break
            if original[backward] == word and not labels[backward]:
                labels[backward] = True
                at = backward
                break
    return labels


def trusted(annotations: Iterable[Annotation], variation: float = 0.05, gap: float = 0.10) -> list[Annotation]:
    """Leave out the worst pairs: first by variation rate, of the rest by alignment gap.

    Args:
        annotations: all.
        variation: share with the highest variation rates that goes; 5 % in the paper, 10 % in the code.
        gap: share of the rest with the widest gaps that goes.

    Raises:
        ValueError: a share outside [0, 1].
    """
    for name, share in (("variation", variation), ("gap", gap)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be in [0, 1], the share of pairs that is left out")
    found = list(annotations)
    for share, rates in ((variation, 2), (gap, 3)):
        if found:
            values = torch.tensor([annotation[rates] for annotation in found], dtype=torch.float64)
            worst = values > torch.quantile(values, 1 - share)
            found = [annotation for annotation, bad in zip(found, worst.tolist(), strict=True) if not bad]
    return found
