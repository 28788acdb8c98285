r"""LongBench's own scores of an answer against one right answer, 0 to 1, as its evaluation computes them.

Source: `longbench` (arXiv 2308.14508), Table 1; official code THUDM/LongBench@2e00731f8d0bff23dc4325161044d0ed8af94c1e,
`LongBench/metrics.py`, and the packages it calls: ROUGE-L of pltrdy/rouge@c1b90a78c303b5d5956b1c1f2dac19cdd553d9b9,
`rouge/rouge_score.py`; edit similarity as `fuzz.ratio` of fuzzywuzzy, which is difflib's ratio in whole percent.

Differs from the paper: none in what is scored. Two habits of that code are kept on purpose, since published figures have them:
ROUGE-L counts different words (sets) over sentences that end at any period, and a class is struck off while the list of
classes is walked through, so that the one after it is not looked at.

Not here: scores of Chinese text, which need a word segmenter.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

PUNCTUATION = str.maketrans("", "", string.punctuation)


def qa_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words; case, punctuation and articles do not count.

    Examples:
        >>> qa_f1("In Rome.", "the Rome")
        0.6666666666666666
    """
    given, right = _words(prediction), _words(answer)
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    r"""F of the union of longest common subsequences, over sentences.

    With $U$ the different words that stand in the longest common subsequence of any right sentence with any given one,
    recall is $|U|$ over the different words of the answer, precision $|U|$ over those of the prediction.

    Examples:
        >>> round(rouge_l("Anna met Boris", "Boris met Anna. Boris left"), 4)
        0.5714
    """
    given, right = _sentences(prediction), _sentences(answer)
    if not given or not right:
        return 0.0
    union = {word for r in right for g in given for word in _common_subsequence(r, g)}
    recall, precision = (len(union) / len({word for sentence in side for word in sentence}) for side in (right, given))
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    A class that is a part of the right one's name does not count.

    Examples:
        >>> classification("a Date or a Place", "Date", ["Date", "Place", "Person"])
        0.5
    """
    named = [name for name in classes if name in prediction]
    for name in named:  # `named` shrinks meanwhile, as in the official code
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the right one.

    Examples:
        >>> count("7, or 17", "7")
        0.5
    """
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the right paragraph's.

    Examples:
        >>> retrieval("Paragraph 12", "Paragraph 12"), retrieval("none", "Paragraph 12")
        (1.0, 0.0)
    """
    found = re.search(r"Paragraph (\d+)", answer)
    return count(prediction, found[1]) if found else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    r"""Twice the characters in matching blocks over all characters, in whole percent, of the first line that is no comment.

    Examples:
        >>> code_similarity("# a remark\nreturn x", "return y")
        0.88
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(right: Sequence[str], given: Sequence[str]) -> list[str]:
    """The words of one longest common subsequence; of several, the one that is found from the end, given words left out first."""
    table = [[0] * (len(given) + 1)]
    for word in right:
        above, row = table[-1], [0]
        for j, other in enumerate(given):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, words = len(right), len(given), []
    while i and j:
        if right[i - 1] == given[j - 1]:
            words.append(right[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
