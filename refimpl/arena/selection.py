r"""Choosing training text for a target from a raw corpus whose sources are known.

The raw corpus mixes four sources in equal parts, pieces of about 128 words: the standard library's *code*, its documentation's
*prose*, texts of the testbed's *tasks*, and *noise*, words of the other three in random order. The target is a small sample of
code or of prose, from other documents than the raw corpus; a method keeps a quarter of the pieces, as many as one source has.
What they teach is measured on further documents of the target's kind: cross-entropy of a count model of words that mixes
bigrams, single words and chance, its weights fixed. No network is trained.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock, takes_no_model
from refimpl.data.selection.ngrams import hashed, kl_reduction, shares, words
from refimpl.data.selection.protocol import RandomSelection, Selection

WORDS = 128  # of a piece, at least
PIECES, QUICK_PIECES = 120, 60  # of each source
SAMPLE = 40  # pieces of the target, and as many to measure on
FROM_ONE = {
    "code": 2,
    "prose": 8,
    "tasks": 8,
}  # pieces of one document at most: few stand for their kind; prose has few
TASKS = ("single_doc_qa", "few_shot", "retrieval")
BUCKETS = 10_000
MIX = (0.6, 0.3, 0.1)  # weights of bigrams, of single words, of chance

ABOUT = (
    "A raw corpus of code, documentation, task texts and noise in equal parts, and a small sample of one of them: a quarter is "
    "kept; how much is of the sample's kind, how near it is in n-grams, and how well a count model learns the kind from it."
)
VERSION = 2
METRICS = (
    Metric("precision", "share of what is kept that is of the target's source", "higher"),
    Metric("kl_reduction", "nats of divergence from the target that the raw corpus has more", "higher"),
    Metric("cross_entropy", "nats a word on other documents of the target's kind", "lower"),
    Metric("seconds", "seconds for the selection", "lower", exact=False),
)
BASELINE = "random selection"
AXES: dict[str, tuple[Any, ...]] = {"target": ("prose", "code")}
QUICK: dict[str, tuple[Any, ...]] = {"target": ("prose",)}


@dataclass(frozen=True)
class Substrate:
    """Raw pieces with their sources, a sample of the target, and other pieces of its kind."""

    raw: list[str]
    sources: list[str]
    target: list[str]
    held_out: list[str]


def baseline(conditions: Conditions) -> dict[str, float]:
    """Any pieces."""
    return figures(RandomSelection(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return figures(implementation(**settings), conditions)


def figures(method: Selection, conditions: Conditions) -> dict[str, float]:
    """Select, and measure what was selected."""
    takes_no_model(conditions)
    kind = conditions.axes["target"]
    given = substrate(kind, conditions.generator, QUICK_PIECES if conditions.quick else PIECES)
    start = clock(torch.device("cpu"))
    chosen = method(given.raw, len(given.raw) // 4, given.target, conditions.generator).tolist()
    seconds = clock(torch.device("cpu")) - start
    kept = [given.raw[i] for i in chosen]
    target, raw, selected = (bucket_shares(texts) for texts in (given.target, given.raw, kept))
    return {
        "precision": sum(given.sources[i] == kind for i in chosen) / len(chosen),
        "kl_reduction": kl_reduction(target, raw, selected),
        "cross_entropy": cross_entropy(kept, given.held_out, given.raw),
        "seconds": seconds,
    }


def bucket_shares(texts: Sequence[str]) -> Tensor:
    """Shares of hashed n-grams, one added to each count, as the paper does not: here empty buckets would decide alone."""
    return shares(hashed(texts, 2, BUCKETS), BUCKETS, smoothing=1.0)


def substrate(kind: str, generator: torch.Generator, n: int) -> Substrate:
    """Draw n pieces of each source, and the target's sample and held-out pieces, no document serving two of these."""
    draw = random.Random(int(torch.randint(2**31, (), generator=generator)))
    found = {name: _pieces(name, generator, draw) for name in ("code", "prose", "tasks")}
    target, held_out = (_take(found[kind], SAMPLE, FROM_ONE[kind]) for _ in range(2))
    raw = {name: _take(pieces, n, FROM_ONE[name]) for name, pieces in found.items()}
    pool = [word for pieces in raw.values() for piece in pieces for word in piece.split()]
    raw["noise"] = [" ".join(draw.choices(pool, k=WORDS)) for _ in range(n)]
    mixed = [(piece, name) for name, pieces in raw.items() for piece in pieces]
    draw.shuffle(mixed)
    return Substrate([piece for piece, _ in mixed], [name for _, name in mixed], target, held_out)


def _take(documents: Iterator[list[str]], n: int, from_one: int) -> list[str]:
    """Pieces, n of as many documents as that takes, `from_one` of each; other pieces of these documents are lost."""
    taken: list[str] = []
    for pieces in documents:
        taken += pieces[:from_one]
        if len(taken) >= n:
            return taken[:n]
    raise ValueError(f"the source has {len(taken)} pieces left, of {n} that are needed")


def _pieces(source: str, generator: torch.Generator, draw: random.Random) -> Iterator[list[str]]:
    """Documents of a source in random order, each in pieces."""
    if source == "tasks":
        while True:
            for task in TASKS:
                for sample in testbed.tasks.samples(task, 4, 512, generator):
                    yield _cut(sample.context + sample.question + sample.answer)
    texts = testbed.corpus.documents("train")
    names = sorted(name for name in texts if name.startswith("topic ") == (source == "prose"))
    draw.shuffle(names)
    for name in names:
        yield _cut(texts[name])


def _cut(text: str) -> list[str]:
    """Whole lines, `WORDS` words or a line more in each piece; what is left at the end is dropped."""
    pieces: list[str] = []
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(words(line))
        if length >= WORDS:
            pieces.append("".join(lines))
            lines, length = [], 0
    return pieces


def cross_entropy(train: Sequence[str], test: Sequence[str], known: Sequence[str]) -> float:
    r"""Nats a word of an interpolated count model, $0.6 \, p(w \mid v) + 0.3 \, p(w) + 0.1 / V$.

    Args:
        train: texts to count in; may be empty.
        test: texts to predict, each word but a text's first.
        known: texts whose words are the vocabulary of V, with one more for all others; the same for every selection.
    """
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in known for word in words(text)}))}
    size = len(vocabulary) + 1
    before, after = _pairs(train, vocabulary)
    v, w = _pairs(test, vocabulary)
    single, first = torch.bincount(after, minlength=size).double(), torch.bincount(before, minlength=size).double()
    pair, count = torch.unique(before * size + after, return_counts=True)
    place = torch.searchsorted(pair, v * size + w).clamp(max=max(len(pair) - 1, 0))
    both = torch.where(pair[place] == v * size + w, count[place], 0).double() if len(pair) else torch.zeros(len(v))
    chances = (both / first[v].clamp(min=1), single[w] / single.sum().clamp(min=1), torch.full((len(v),), 1 / size))
    return -float(sum(share * chance for share, chance in zip(MIX, chances, strict=True)).log().mean())  # type: ignore[union-attr]


def _pairs(texts: Sequence[str], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Neighbours in texts: the words before and after, `[pairs]` each."""
    split = [[vocabulary.get(word, len(vocabulary)) for word in words(text)] for text in texts]
    pairs = [pair for ids in split for pair in itertools.pairwise(ids)]
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0], both[:, 1]
