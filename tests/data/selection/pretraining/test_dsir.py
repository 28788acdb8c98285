"""DSIR: weights by hand, the law of drawing without replacement by enumeration, and corpora whose sources are known."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.data.selection.ngrams import hashed, kl_reduction, shares
from refimpl.data.selection.pretraining.dsir import DSIR, gumbel, log_weights
from refimpl.data.selection.protocol import RandomSelection


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(raw, target, n=2, buckets=10_000, smoothing=0.0):
    found = hashed(raw, n, buckets)
    return log_weights(found, shares(hashed(target, n, buckets), buckets, smoothing), shares(found, buckets))


def test_log_weights_by_hand():
    """Oracle: by hand. Target "a a b": shares a 2/5, b 1/5, "a a" 1/5, "a b" 1/5. Raw "a b", "b": a 1/4, b 2/4, "a b" 1/4."""
    ratio = {"a": (2 / 5) / (1 / 4), "b": (1 / 5) / (2 / 4), "a b": (1 / 5) / (1 / 4)}
    expected = [math.log(ratio["a"]) + math.log(ratio["b"]) + math.log(ratio["a b"]), math.log(ratio["b"])]
    assert_close(
        weights(["a b", "b"], ["a a b"]), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )  # the floor of 1e-8


def test_what_the_target_lacks_costs_the_floor():
    """Oracle: by hand. "z" has share 0 in the target and 1/2 in the raw texts: log(1e-8) - log(1/2); empty texts weigh 1."""
    found = weights(["z", "a", ""], ["a"])
    assert found.tolist() == pytest.approx([math.log(1e-8) - math.log(0.5), math.log(2), 0.0], abs=1e-6)
    smooth = weights(["z", "a"], ["a"], buckets=50, smoothing=1.0)
    assert float(smooth[0]) == pytest.approx(math.log(1 / 51) - math.log(0.5), abs=1e-5)


def test_collisions_add_up():
    """Oracle: with one bucket every text has the same share of it in both corpora: all weights are 1."""
    assert weights(["a b", "c", "d e f"], ["x y"], buckets=1).tolist() == [0.0, 0.0, 0.0]
    assert weights(["a b", "c"], ["a b"]).abs().min() > 0.1  # negative control


def sets_without_replacement(p, k):
    """Probability of each set of k when items are drawn one by one in proportion to p."""
    law = dict.fromkeys(itertools.combinations(range(len(p)), k), 0.0)
    for order in itertools.permutations(range(len(p)), k):
        chance, left = 1.0, sum(p)
        for item in order:
            chance *= p[item] / left
            left -= p[item]
        law[tuple(sorted(order))] += chance
    return law


def chi_square(law, counts):
    n = sum(counts.values())
    return sum((counts.get(chosen, 0) - n * chance) ** 2 / (n * chance) for chosen, chance in law.items())


def test_gumbel_top_k_draws_without_replacement():
    """Oracle: all 10 sets of 2 of 5, by enumeration. Chi-square with 9 degrees of freedom is above 27.9 once in a thousand."""
    p = [0.4, 0.3, 0.15, 0.1, 0.05]
    law = sets_without_replacement(p, 2)
    assert sum(law.values()) == pytest.approx(1)
    noised = gumbel(torch.tensor(p, dtype=torch.float64).log().repeat(20_000, 1), seeded())
    chosen, times = noised.topk(2, dim=1).indices.sort(dim=1).values.unique(dim=0, return_counts=True)
    counts = {tuple(pair): n for pair, n in zip(chosen.tolist(), times.tolist(), strict=True)}
    assert chi_square(law, counts) < 27.9
    others = sets_without_replacement([q**0.9 for q in p], 2)  # negative control: a law that is a little flatter
    assert chi_square(others, counts) > 27.9


CODE = "def return self import for in range len print None True value index list dict"
PROSE = "the of and river walked house morning she never quietly into garden light old"


def texts(vocabulary, n, length, seed):
    """Texts of words that are not equally likely."""
    g = seeded(seed)
    known = vocabulary.split()
    likely = torch.arange(1.0, len(known) + 1)
    return [" ".join(known[i] for i in torch.multinomial(likely, length, True, generator=g)) for _ in range(n)]


def test_finds_the_source_that_the_target_comes_from():
    """Oracle: labels. 60 of 300 texts are code, and 60 are wanted; random selection gets a fifth of them right."""
    raw = texts(CODE, 60, 30, 1) + texts(PROSE, 240, 30, 2)
    target = texts(CODE, 20, 30, 3)
    chosen = DSIR(min_words=0)(raw, 60, target, seeded())
    assert chosen.tolist() == list(range(60))
    by_chance = RandomSelection()(raw, 60, target, seeded())
    assert 0.05 < (by_chance < 60).float().mean() < 0.4  # negative control


def test_noise_keeps_the_rarer_kind_that_the_largest_weights_lose():
    """Oracle: a target of 80 % code and 20 % prose, texts of both kinds in raw in equal parts, of one word so that weights are
    0.8 / 0.5 and 0.2 / 0.5: a draw has both kinds in about these shares, the largest weights are of one kind."""
    raw = texts(CODE, 500, 1, 1) + texts(PROSE, 500, 1, 2)
    target = texts(CODE, 800, 1, 3) + texts(PROSE, 200, 1, 4)
    share = {
        noise: float((DSIR(n=1, min_words=0, noise=noise)(raw, 100, target, seeded()) < 500).float().mean())
        for noise in (True, False)
    }
    assert 0.68 < share[True] < 0.92 and share[False] == 1.0


def test_short_examples_come_last():
    """Oracle: by hand. Two of four have three words; the best match of all has one."""
    raw = ["a", "x y z", "p q r", "a a"]
    assert DSIR(min_words=3)(raw, 2, ["a"], seeded()).tolist() == [1, 2]
    best = DSIR(min_words=3, noise=False)(raw, 3, ["a"], seeded())
    assert best.tolist() == [0, 1, 2]  # "a a" has a pair that the target lacks
    assert DSIR(min_words=0, noise=False)(raw, 2, ["a"], seeded()).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0 and buckets=10000 must be at least 1"),
        ({"buckets": 0}, "buckets=0 must be at least 1"),
        ({"min_words": -1}, "min_words=-1 and smoothing=0.0 must not be negative"),
        ({"smoothing": -1.0}, "smoothing=-1.0 must not be negative"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        DSIR(**change)


@pytest.mark.parametrize("target", [[], ["", " \n"]])
def test_a_target_without_words_is_refused(target):
    with pytest.raises(ValueError, match="has no word; there is nothing to resemble"):
        DSIR()(["a", "b"], 1, target, seeded())


SELECTIONS = {
    "random": RandomSelection(),
    "dsir": DSIR(),
    "largest": DSIR(noise=False),
    "unigrams": DSIR(n=1),
    "few buckets": DSIR(n=1, buckets=8),
    "fewer buckets": DSIR(n=1, buckets=3),
    "smoothed": DSIR(smoothing=1.0),
    "most smoothed": DSIR(smoothing=100.0),
}


@pytest.fixture(scope="module")
def figures():
    """KL reduction as the paper has it, without smoothing, and held-out cross-entropy: `[target, draw, selection]` each.

    The corpora are the arena's, three draws for each of its two targets.
    """
    from refimpl.arena import selection

    n, reductions, losses = selection.QUICK_PIECES, [], []
    for target, seed in itertools.product(("prose", "code"), range(3)):
        given = selection.substrate(target, seeded(seed), n)
        p, q = (shares(hashed(texts), 10_000) for texts in (given.target, given.raw))
        for method in SELECTIONS.values():
            kept = [given.raw[i] for i in method(given.raw, n, given.target, seeded(seed))]
            reductions.append(kl_reduction(p, q, shares(hashed(kept), 10_000)))
            losses.append(selection.cross_entropy(kept, given.held_out, given.raw))
    return tuple(torch.tensor(found).view(2, 3, len(SELECTIONS)) for found in (reductions, losses))


def test_claim_kl_reduction_predicts(figures, claim):
    """Pearson's correlation over eight selections, of means over targets (the paper's are over eight) and draws."""
    reductions, losses = figures
    both = torch.stack([reductions.mean(dim=(0, 1)), -losses.mean(dim=(0, 1))])
    claim("dsir", "kl-reduction-predicts", float(torch.corrcoef(both)[0, 1]))


def test_claim_beats_random(figures, claim):
    """Cross-entropy of a count model of DSIR's selection over random selection's, means over draws, on the worse target."""
    losses = dict(zip(SELECTIONS, figures[1].mean(dim=1).T, strict=True))
    claim("dsir", "beats-random", float((losses["dsir"] / losses["random"]).max()))
