r"""How much two texts have in common: BLEU of a sentence, and ROUGE-L; of words, or of tokens.

Source: BLEU as Papineni et al. (2002), smoothed where an order has no match as the third smoothing of Chen and Cherry (2014);
harvardnlp/seq2seq-attn@2d36b4348dad5a18571495feacddcf8c6620a678, `s2sa/scorers/bleu.lua`, does so for `sequence-kd`. ROUGE-L
as Lin (2004), which YJiangcm/Lion@0d94c4c7e2e5e545dc68253f6e242712b9e4edc0, `src/generate_hard_instruction.py`, takes from the
package rouge-score.

Differs from these: a text without words has nothing in common with any, where theirs divide by zero.

Not here: several references; the BLEU of a corpus, which adds up counts before it divides.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def sentence_bleu(candidate: Sequence[Hashable], reference: Sequence[Hashable], order: int = 4) -> float:
    r"""$\mathrm{BP} \cdot \prod_{n=1}^{N} p_n^{1/N}$, $p_n$ being the share of the candidate's n-grams that the reference has.

    A shorter candidate is punished by $\mathrm{BP} = e^{1 - |r|/|c|}$. The first order without a match counts half a match,
    the next a quarter, and so on; orders longer than the candidate count as 1.

    Args:
        candidate: words or tokens.
        reference: the same.
        order: $N$, the longest n-grams.

    Returns:
        0 to 1.

    Raises:
        ValueError: order below 1.

    Examples:
        >>> sentence_bleu("the cat sat on it".split(), "the cat sat on it".split())
        1.0
        >>> round(sentence_bleu("a b c d".split(), "a b x d".split(), order=2), 6)  # the root of 3/4 * 1/3
        0.5
    """
    if order < 1:
        raise ValueError(f"order={order} must be at least 1; 4 is usual")
    if not candidate or not reference:
        return 0.0
    half, logs = 1.0, 0.0
    for n in range(1, min(order, len(candidate)) + 1):
        ours, theirs = _grams(candidate, n), _grams(reference, n)
        matches: float = (ours & theirs).total()
        if matches == 0:
            half /= 2
            matches = half
        logs += math.log(matches / ours.total())
    return math.exp(logs / order + min(0.0, 1 - len(reference) / len(candidate)))


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence.

    Examples:
        >>> rouge_l("name a red fruit".split(), "name a green fruit".split())
        0.75
    """
    common = _common_subsequence(candidate, reference)
    return 2 * common / (len(candidate) + len(reference)) if common else 0.0


def most_alike(candidate: Sequence[Hashable], references: Sequence[Sequence[Hashable]]) -> float:
    """The highest `rouge_l` with any of these, 0 if there are none.

    A subsequence is never longer than the words in common, whatever their order, so most pairs need no search.

    Examples:
        >>> most_alike("name a red fruit".split(), ["sing".split(), "name a green fruit".split()])
        0.75
    """
    words, best = Counter(candidate), 0.0
    for reference in references:
        bound = 2 * (words & Counter(reference)).total() / (len(candidate) + len(reference) or 1)
        if bound > best:
            best = max(best, rouge_l(candidate, reference))
    return best


def _grams(text: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]
