r"""Scores of an answer against the right one, 0 to 1, as LongBench defines them for its groups of tasks.

Source: `longbench` (arXiv 2308.14508), Table 1 for which group is scored how; F1 as in SQuAD, ROUGE-L by the longest common
subsequence (Lin, 2004), edit similarity as in RepoBench.

Differs from the paper: our answers have no articles and no punctuation to be taken away, so words are compared as they stand.
"""

from collections import Counter
from collections.abc import Sequence


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words.

    Examples:
        >>> f1("in Rome", "Rome")
        0.6666666666666666
    """
    given, right = prediction.split(), answer.split()
    return _f(sum((Counter(given) & Counter(right)).values()), len(given), len(right))


def rouge_l(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words.

    Examples:
        >>> rouge_l("Anna salmon Boris", "Boris Anna salmon")
        0.6666666666666666
    """
    given, right = prediction.split(), answer.split()
    return _f(_common_subsequence(given, right), len(given), len(right))


def exact(prediction: str, answer: str) -> float:
    """1 if both are the same.

    Examples:
        >>> exact(" 7", "7"), exact("17", "7")
        (1.0, 0.0)
    """
    return float(prediction.strip() == answer.strip())


def edit_similarity(prediction: str, answer: str) -> float:
    """1 minus the Levenshtein distance of characters over the longer length.

    Examples:
        >>> edit_similarity("width, mode)", "width)")
        0.5
    """
    given, right = prediction.strip(), answer.strip()
    return 1 - _distance(given, right) / max(len(given), len(right), 1)


def _f(common: int, given: int, right: int) -> float:
    return 2 * common / (given + right) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b):
            row.append(min(above[j] + (x != y), above[j + 1] + 1, row[j] + 1))
    return row[-1]
