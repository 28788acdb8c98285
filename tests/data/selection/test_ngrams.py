"""Hashed n-grams: by hand, and against counting in plain Python."""

import hashlib
from collections import Counter

import pytest
import torch

from refimpl.data.selection.ngrams import Hashed, bucket, hashed, kl_reduction, shares, words

TEXTS = ["The cat, the CAT!", "", "one", "a b c a b c", "  \n\t", "ünïcode wörd 数学 x²"]


def counted(text, n, buckets):
    """Counts by bucket, word by word."""
    found, tokens = Counter(), words(text)
    for order in range(1, n + 1):
        for start in range(len(tokens) - order + 1):
            gram = " ".join(tokens[start : start + order])
            found[int.from_bytes(hashlib.sha256(gram.encode("utf-8")).digest()) % buckets] += 1
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("buckets", [1, 7, 10_000])
def test_equals_counting_one_by_one(n, buckets):
    """Oracle: brute force over words, hashes from the digest's bytes; with 7 buckets n-grams collide, with 1 all do."""
    found = hashed(TEXTS, n, buckets)
    for number, text in enumerate(TEXTS):
        assert Counter(found.bucket[found.text == number].tolist()) == counted(text, n, buckets)
    assert found.words.tolist() == [6, 0, 1, 6, 0, 4]


def test_words_by_hand():
    """Oracle: nltk's WordPunct rule by hand: runs of letters, digits and `_`; runs of what is neither these nor space."""
    assert words("The cat, the CAT!") == ["the", "cat", ",", "the", "cat", "!"]
    assert words("x²=3.5...(a_b)") == ["x²", "=", "3", ".", "5", "...(", "a_b", ")"]


def test_a_bucket_by_hand():
    """Oracle: SHA-256 of "abc", FIPS 180-2's own example, ends in ...f20015ad; modulo 16 that is 13."""
    assert bucket("abc", 16) == 0xD and bucket("abc", 2**16) == 0x15AD


def test_shares_and_smoothing_by_hand():
    """Oracle: by hand, counts 3 and 1 of four buckets; with 1 added, of 8."""
    found = Hashed(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 2, 0]), torch.tensor([4]))
    assert shares(found, 4).tolist() == [0.75, 0, 0.25, 0]
    assert shares(found, 4, smoothing=1).tolist() == [0.5, 0.125, 0.25, 0.125]
    assert shares(hashed([""], 2, 4), 4).tolist() == [0.25] * 4


def test_kl_reduction_by_hand():
    """Oracle: KL(p||q) - KL(p||s) written out with torch's own divergence."""
    p, q, s = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.5], [0.9, 0.1], [0.7, 0.3]))
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum") - torch.nn.functional.kl_div(
        s.log(), p, reduction="sum"
    )
    assert kl_reduction(p, q, s) == pytest.approx(float(expected), abs=1e-6)
    assert kl_reduction(p, q, q) == 0 and kl_reduction(p, s, q) < 0  # negative control: away from the target


@pytest.mark.parametrize(("n", "buckets"), [(0, 5), (2, 0)])
def test_bad_sizes_are_refused(n, buckets):
    with pytest.raises(ValueError, match=f"n={n} and buckets={buckets} must be at least 1"):
        hashed(["a"], n, buckets)
