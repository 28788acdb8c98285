"""LLMLingua2: which words go over the budget by sorting, chunks on their own, and what is told survives."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from refimpl.data.prompting.compression.annotation import annotate
from refimpl.data.prompting.compression.llmlingua2 import (
    CLASSIFIER,
    ByClassifier,
    LLMLingua2,
    chunks,
    owners,
    repeats,
    word_probabilities,
    word_starts,
)
from refimpl.data.prompting.compression.protocol import most, portions
from refimpl.data.prompting.compression.training import labelled
from refimpl.testbed.pairs import pairs
from refimpl.testbed.tokenizer import tokenizer

TEXT = "    return self.size\n- Anna lives in Rome.\n    for line in lines:\n- Leo drinks tea.\nclass Table:\n"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Told:
    """A classifier that says what it is told of each piece of text, and 0.1 of others."""

    def __init__(self, known, reader):
        self.known, self.reader, self.read = known, reader, []

    def probabilities(self, texts):
        self.read += [self.reader.decode(list(text)) for text in texts]
        return [torch.tensor([self.known.get(self.reader.decode([i]).strip(" "), 0.1) for i in t]) for t in texts]


def told(known, **settings):
    """Compressor with the testbed's tokenizer on both sides."""
    return ByClassifier(tokenizer(), LLMLingua2(**settings), Told(known, tokenizer()), tokenizer())


def left(compressor, text, budget):
    return compressor.tokenizer.decode(compressor.compress([text], [budget])[0].ids.tolist())


@pytest.fixture(scope="module")
def compressor():
    return LLMLingua2().compressor(tokenizer())


def words_only(n, seed=0):
    """A text of single-token words."""
    from refimpl.testbed.world import NAMES

    return random.Random(seed).sample(NAMES, n)


def test_the_most_probable_words_stay_by_sorting():
    """Oracle: sorting; and the percentile of numpy, above which exactly the kept ones lie."""
    names = words_only(33)
    p = dict(zip(names, torch.rand(33, generator=seeded()).tolist(), strict=True))
    for budget in (1, 8, 16, 32):
        expected = sorted(sorted(names, key=lambda name: -p[name])[:budget], key=names.index)
        assert left(told(p), " " + " ".join(names), budget).split() == expected
        threshold = np.percentile(list(p.values()), 100 * (1 - budget / 33))
        assert [name for name in names if p[name] > threshold] == expected


def test_words_stay_whole_but_for_the_last():
    """Oracle: by hand. "load_file" and " 17", of three tokens each, stay before "Anna"; one token more cuts into "Leo2048"."""
    sure, likely, even = dict.fromkeys(["", "1", "7"], 0.9), dict.fromkeys(["load", "_", "file"], 0.8), {"Anna": 0.5}
    p = sure | likely | even | dict.fromkeys(["Leo", "2", "0", "4", "8"], 0.4)
    text = " Anna load_file Leo2048 17"
    assert left(told(p), text, 6) == " load_file 17"
    assert left(told(p), text, 7) == " Anna load_file 17"
    assert left(told(p), text, 8) == " Anna load_file Leo 17"


def test_a_word_counts_by_the_mean_of_its_tokens_or_by_the_first():
    """Oracle: by hand. "load_file" has (0.9 + 0.1 + 0.2) / 3 = 0.4, less than "Anna" at 0.5; by its first token, more."""
    p = {"load": 0.9, "_": 0.1, "file": 0.2, "Anna": 0.5}
    assert left(told(p), " Anna load_file", 1) == " Anna"
    assert left(told(p, token_to_word="first"), " Anna load_file", 3) == " load_file"
    word = torch.tensor([0, 0, 1, 2, 2, 2])
    x = torch.tensor([0.2, 0.4, 0.9, 0.3, 0.6, 0.9])
    assert word_probabilities(x, word, "mean").tolist() == pytest.approx([0.3, 0.9, 0.6])
    assert word_probabilities(x, word, "first").tolist() == pytest.approx([0.2, 0.9, 0.3])


def test_forced_tokens_come_first_but_not_beyond_the_budget():
    """Oracle: by hand. "." has 0.1 like every mark; forced, all three stay before "Anna" with 0.9; of too many the first stay."""
    text = " Anna. Leo. Ida."
    p = {"Anna": 0.9, "Leo": 0.8}
    assert left(told(p), text, 2) == " Anna Leo"
    assert left(told(p, force_tokens=(".",)), text, 4) == " Anna..."
    assert left(told(p, force_tokens=(".",)), text, 2) == ".."
    assert left(told(p, force_tokens=("\n",)), " Ida\n Leo", 1) == "\n"


def test_digits_count_as_certain():
    """Oracle: by hand. " 42" has three tokens of 0.1 each; with certain digits (0.1 + 1 + 1) / 3 = 0.7, more than "Anna"."""
    assert left(told({"Anna": 0.6}), " Anna 42", 1) == " Anna"
    assert left(told({"Anna": 0.6}, force_reserve_digit=True), " Anna 42", 3) == " 42"
    assert left(told({"Anna": 0.8}, force_reserve_digit=True), " Anna 42", 1) == " Anna"


def test_forced_tokens_in_a_row_go():
    """Oracle: by hand. Between the three "." nothing stays: without the rule they fill the budget of 4, with it "Leo" and "Ida"
    come before the second and third."""
    text = " Anna. Leo. Ida."
    p = {"Anna": 0.9}
    assert left(told(p, force_tokens=(".",)), text, 4) == " Anna..."
    assert left(told(p, force_tokens=(".",), drop_consecutive=True), text, 4) == " Anna. Leo Ida"
    assert left(told(p, force_tokens=(".",), drop_consecutive=True), text, 6) == text


def by_loop(words, forced, kept):
    """The rule as one would say it, word by word."""
    found, between, before = [], False, None
    for word, is_forced, stays in zip(words, forced, kept, strict=True):
        found.append(is_forced and not between and word == before)
        if is_forced:
            between, before = False, word
        else:
            between = between or stays
    return found


def test_repeats_by_a_loop():
    """Oracle: the rule said word by word, on 300 random texts."""
    draw = random.Random(0)
    seen = 0
    for _ in range(300):
        words = [draw.choice([".", "?", "a", "b"]) for _ in range(draw.randint(1, 12))]
        forced = [word in ".?" for word in words]
        kept = [is_forced or draw.random() < 0.4 for is_forced in forced]
        expected = by_loop(words, forced, kept)
        assert repeats(words, torch.tensor(forced), torch.tensor(kept)).tolist() == expected
        seen += sum(expected)
    assert seen > 100


def test_chunks_cover_the_text_and_end_where_they_may():
    """Oracle: by hand, and by looking at every cut: at an end, or as large as allowed with no end inside."""
    assert chunks([False] * 5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert chunks([True, False, False, True, False], 3) == [(0, 1), (1, 4), (4, 5)]
    assert chunks([], 3) == []
    draw = random.Random(0)
    for _ in range(100):
        ends = [draw.random() < 0.2 for _ in range(draw.randint(1, 60))]
        size = draw.randint(1, 12)
        found = chunks(ends, size)
        assert [i for a, b in found for i in range(a, b)] == list(range(len(ends)))
        for a, b in found[:-1]:
            assert 1 <= b - a <= size and (ends[b - 1] or (b - a == size and not any(ends[a:b])))
            assert not any(ends[b : a + size])


def test_each_chunk_is_compressed_on_its_own(compressor):
    """Oracle: the chunks' texts, compressed alone with their share of the budget; with one chunk the result is another."""
    text = TEXT + "- Ida plays the harp.\nimport os\n" + TEXT
    ids = tokenizer().encode(text).ids
    cut = LLMLingua2(chunk=24).compressor(tokenizer())
    bounds = chunks([tokenizer().decode([i]).strip(" ") in (".", "\n") for i in ids], 24)
    assert len(bounds) > 3
    budgets = portions([b - a for a, b in bounds], 30)
    alone = [
        left(compressor, tokenizer().decode(ids[a:b]), budget) for (a, b), budget in zip(bounds, budgets, strict=True)
    ]
    assert left(cut, text, 30) == "".join(alone)
    assert left(compressor, text, 30) != "".join(alone)


def test_the_encoder_reads_chunks():
    """Oracle: counting."""
    made = told({}, chunk=10)
    left(made, TEXT, 9)
    assert "".join(made.classifier.read) == TEXT and len(made.classifier.read) > 4
    assert all(len(tokenizer().encode(text).ids) <= 10 for text in made.classifier.read)


def test_a_reader_with_another_tokenizer(compressor):
    """Oracle: the words kept for a reader with the classifier's own tokenizer. A reader that reads characters gets the same words,
    since each of its tokens has the priority of the word that it stands in."""
    text = " Anna lives in Rome\n return self.size\n Leo has a dog\n"
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(text)))}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert [text[a:b] for a, b in letters.encode(text).offsets] == list(text)
    kept = left(compressor, text, 6)
    found = LLMLingua2().compressor(letters).compress([text], [len(kept)])[0]
    assert "".join(text[i] for i in found.kept.tolist()) == kept
    own = owners(letters.encode(text), tokenizer().encode(text)).tolist()
    assert own == sorted(own) and len(set(own)) == len(tokenizer().encode(text).ids)


def test_tokens_of_a_character_in_pieces():
    """Oracle: by hand. A dash of three bytes is a mark, and a letter of two bytes is part of its word, however many tokens."""
    text = "naïve — x"
    read = tokenizer().encode(text)
    starts = word_starts([text[a:b] for a, b in read.offsets], read.offsets)
    words = [text[a:b] for (a, b), start in zip(read.offsets, starts.tolist(), strict=True) if start]
    assert words[0].startswith("n") and " x" in words and not any(word.startswith("v") for word in words)
    assert starts.sum() >= 3


def test_a_classifier_that_reads_spaces_as_nothing():
    """Oracle: by hand. Of nothing but spaces the first stay; in words its tokens do not cover the spaces before them."""
    words = Tokenizer(models.WordLevel({"Anna": 0, "Leo": 1, "Rome": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = ByClassifier(tokenizer(), LLMLingua2(), Told({"Leo": 0.9, "Rome": 0.8}, words), words)
    assert made.compress(["  \n \n"], [2])[0].kept.tolist() == [0, 1]
    assert left(made, " Anna Leo Rome", 1) == " Leo" and left(made, " Anna Leo Rome", 2) == " Leo Rome"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk=0 must be at least 1 token"),
        ({"token_to_word": "max"}, "token_to_word='max' must be 'mean' or 'first'"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LLMLingua2(**change)


def test_a_missing_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        LLMLingua2(classifier=tmp_path / "none.safetensors").compressor(tokenizer())


def test_the_classifier_that_comes_along_is_small():
    assert Path(CLASSIFIER).stat().st_size < 500_000


@pytest.fixture(scope="module")
def unseen(compressor):
    """Held-out texts of the arena's length: text, tokens, which of them the teacher keeps, and what the classifier says."""
    found = []
    for text, short in pairs(14, 896, seeded(11), split="held-out"):
        ((ids, labels),) = labelled([annotate(text, short, window=len(text))], tokenizer())
        found.append((text, ids, torch.tensor(labels).bool()))
    return found


def test_labels_of_texts_that_it_has_not_seen(compressor, unseen):
    """Oracle: the teacher's labels; always saying "discard" is right as often as it discards, with F1 of 0."""
    read = [ids[a : a + 512] for _, ids, _ in unseen for a in range(0, len(ids), 512)]
    says = torch.cat(compressor.classifier.probabilities(read)) > 0.5
    keep = torch.cat([labels for *_, labels in unseen])
    assert (says == keep).float().mean() > 1 - keep.float().mean() + 0.03
    assert 2 * (says & keep).sum() / (says.sum() + keep.sum()) > 0.6


def share_told(unseen, choose):
    """Mean share of the teacher's tokens that are among a quarter of all."""
    shares = [labels[choose(text, ids, -(-len(ids) // 4))].sum() / labels.sum() for text, ids, labels in unseen]
    return float(torch.stack(shares).mean())


def test_claim_keeps_what_is_told(compressor, unseen, claim):
    """At a quarter of the tokens: share kept of those that tell something, over the best of a random choice, the first, the last."""
    generator = seeded(3)
    ours = share_told(unseen, lambda text, ids, k: compressor.compress([text], [k])[0].kept)
    others = [
        share_told(unseen, lambda text, ids, k: most(torch.rand(len(ids), generator=generator), k)),
        share_told(unseen, lambda text, ids, k: torch.arange(k)),
        share_told(unseen, lambda text, ids, k: torch.arange(len(ids) - k, len(ids))),
    ]
    claim("llmlingua2", "keeps-what-is-told", ours / max(others))


def test_claim_faithful(compressor, unseen, claim):
    """Share of the kept tokens that are found in the prompt from left to right, at four budgets."""
    found = total = 0
    for text, ids, _ in unseen:
        for times in (2, 4, 6, 8):
            kept = compressor.compress([text], [len(ids) // times])[0].ids.tolist()
            rest = iter(ids)
            found, total = found + sum(token in rest for token in kept), total + len(kept)
    claim("llmlingua2", "faithful", found / total)
