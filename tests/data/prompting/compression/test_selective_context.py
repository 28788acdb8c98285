"""SelectiveContext: units and percentile by numpy and loops, sentences on their own, and what the paper claims."""

import random
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from refimpl.data.prompting.compression.annotation import split
from refimpl.data.prompting.compression.selective_context import SelectiveContext, containing, cut
from refimpl.data.prompting.compression.self_information import beginning
from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.testbed.tokenizer import tokenizer

TEXT = "Anna lives in Rome. She has a dog, e.g. a big one. Mr. Lee has load_file(4217)? Yes.\nNo end here"
SENTENCES = [
    "Anna lives in Rome.",
    " She has a dog, e.g. a big one.",
    " Mr. Lee has load_file(4217)?",
    " Yes.",
    "\nNo end here",
]


def test_sentences_by_hand():
    """Oracle: by hand: an end is a `.` or `?` before a space, but not in "e.g." and "Mr."; joined they are the text."""
    assert cut(TEXT) == SENTENCES
    assert cut("") == [] and cut("a. ") == ["a.", " "] and cut(".") == ["."]
    assert cut("Oh! Yes. No") == ["Oh! Yes.", " No"]


def test_a_token_over_several_parts_counts_for_the_one_it_ends_in():
    """Oracle: by hand: one token, which is all of the text."""
    whole = Tokenizer(models.WordLevel({"a cat": 0}, unk_token="a cat"))
    assert containing(["a", " cat"], whole.encode("a cat")).tolist() == [1]
    assert containing(["a cat", " sat"], whole.encode("a cat")).tolist() == [0]


def by_loops(model, unit):
    """Self-information of each unit of TEXT: every sentence read alone, then the mean over tokens that end in the unit."""
    found, units = [], []
    for sentence in SENTENCES:
        ids = tokenizer().encode(TEXT).ids[len(found) : len(found) + len(tokenizer().encode(sentence).ids)]
        assert tokenizer().decode(ids) == sentence
        before = beginning(tokenizer())
        logits = model(torch.tensor([[*before, *ids]]))[0].double()
        found += [-float(logits[len(before) + i - 1].log_softmax(-1)[t]) for i, t in enumerate(ids)]
        units += (
            [sentence]
            if unit == "sentence"
            else split(sentence)
            if unit == "word"
            else tokenizer().encode(sentence).tokens
        )
    if unit == "token":
        return found, list(range(len(found)))
    ends, of_token = np.cumsum([len(u) for u in units]), []
    for _, b in tokenizer().encode(TEXT).offsets:
        of_token.append(next(i for i, end in enumerate(ends) if b <= end))
    return [
        float(np.mean([x for x, i in zip(found, of_token, strict=True) if i == u])) for u in range(len(units))
    ], of_token


@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
def test_units_below_the_percentile_go(tiny, unit):
    """Oracle: loops over sentences read one by one, and numpy's percentile (Eqs. 5, 7, 8); at 0 all stay, at 1 the largest."""
    information, of_token = by_loops(tiny, unit)
    made = SelectiveContext(unit=unit).compressor(tokenizer(), tiny)
    for share in (0.0, 0.2, 0.35, 0.5, 0.8, 1.0):
        threshold = np.percentile(information, 100 * share)
        near = 1e-5 * abs(threshold)  # float32 against float64
        kept = set(made.reduced(TEXT, share).kept.tolist())
        assert {i for i, u in enumerate(of_token) if information[u] > threshold + near} <= kept
        assert not {i for i, u in enumerate(of_token) if information[u] < threshold - near} & kept
    assert made.reduced(TEXT, 0.0).ids.tolist() == tokenizer().encode(TEXT).ids
    assert len({of_token[i] for i in made.reduced(TEXT, 1.0).kept.tolist()}) == 1


@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
def test_a_budget_by_sorting(tiny, unit):
    """Oracle: sorting the units of the loops; the last that fits in part is kept from its beginning."""
    information, of_token = by_loops(tiny, unit)
    ranked = sorted(range(len(of_token)), key=lambda i: (-information[of_token[i]], i))
    made = SelectiveContext(unit=unit).compressor(tokenizer(), tiny)
    for budget in (1, 7, 20):
        assert made.compress([TEXT], [budget])[0].kept.tolist() == sorted(ranked[:budget])


def test_what_stands_at_the_percentile_stays(tiny):
    """Oracle: by hand: equal sentences are equal units; a quarter of two kinds of unit, three of one, is at the threshold, and all stay."""
    text = " Anna has a dog. Anna has a dog. Anna has a dog."
    made = SelectiveContext(unit="sentence").compressor(tokenizer(), tiny)
    assert made.reduced(text, 0.5).ids.tolist() == tokenizer().encode(text).ids
    assert made.compress([text], [5])[0].kept.tolist() == [0, 1, 2, 3, 4]  # of equals the first


def test_sentences_are_read_on_their_own(tiny):
    """Oracle: another first sentence leaves what is kept of the second as it was; the same words in one sentence do not."""
    made = SelectiveContext(unit="token").compressor(tokenizer(), tiny)

    def values(text):
        encoding = tokenizer().encode(text)
        return made._units(text, encoding)[0][-6:]

    end = " Leo drinks tea and milk."
    assert torch.equal(values("Anna lives." + end), values("The dog was in Rome." + end))
    assert not torch.equal(values("Anna lives" + end), values("The dog was in Rome" + end))


def test_phrases_are_those_that_a_function_finds(tiny):
    """Oracle: by hand: with phrases that a function finds, all tokens of one stay or go together."""

    def noun_phrases(sentence):
        return re.findall(r"\s*(?:an?|the) \w+|\s*\w+|\W", sentence)

    text = "Leo saw a dog and the cat near a house"
    made = SelectiveContext(unit=noun_phrases).compressor(tokenizer(), tiny)
    said = made.reduced(text, 0.5)
    phrases = noun_phrases(text)
    assert "".join(phrases) == text and " a dog" in phrases
    left = tokenizer().decode(said.ids.tolist())
    for article, noun in (("a", "dog"), ("the", "cat"), ("a", "house")):
        assert (noun in left) == (f" {article} {noun}" in left)
    with pytest.raises(ValueError, match=r"unit makes \['Leo'\] of 'Leo saw"):
        SelectiveContext(unit=lambda text: [text[:3]]).compressor(tokenizer(), tiny).reduced(text)


def test_no_text_and_bad_settings(tiny):
    made = SelectiveContext().compressor(tokenizer(), tiny)
    assert made.reduced("").ids.tolist() == [] and made.reduced("a").ids.tolist() == tokenizer().encode("a").ids
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share=.* must be in \[0, 1\]"):
            made.reduced("a", share)
    with pytest.raises(ValueError, match="unit='phrase' must be 'token', 'word', 'sentence', or a function"):
        SelectiveContext(unit="phrase")


@pytest.fixture(scope="module")
def lost(asked):
    """Score lost when a share of the words is left out."""
    made = SelectiveContext().compressor(asked.tokenizer, asked.model)
    full = asked.score([torch.arange(n) for n in asked.lengths])
    return {
        share: full - asked.score([made.reduced(text, share).kept for text in asked.contexts])
        for share in (0.2, 0.5, 0.8)
    } | {0: full}


def test_claim_beats_random(asked, lost, claim):
    """Score after half of the words are gone, less that after a random half of them."""
    generator, kept = torch.Generator().manual_seed(3), []
    for text, n in zip(asked.contexts, asked.lengths, strict=True):
        ends = torch.tensor([len(word) for word in split(text)]).cumsum(0)
        last = torch.tensor([b - 1 for _, b in asked.tokenizer.encode(text).offsets])
        word = torch.searchsorted(ends, last, right=True)
        stays = torch.rand(len(ends), generator=generator).argsort() < len(ends) // 2
        kept.append(torch.arange(n)[stays[word]])
    claim("selective-context", "beats-random", lost[0] - lost[0.5] - asked.score(kept))


def test_claim_half_the_context(lost, claim):
    """Score lost with half of the words."""
    claim("selective-context", "half-the-context", lost[0.5])


def test_claim_mild_then_steep(lost, claim):
    """Score lost at 0.8 over that at 0.2."""
    claim("selective-context", "mild-then-steep", lost[0.8] / lost[0.2] if lost[0.2] else float("inf"))


def test_claim_half_the_context_planted(claim):
    """A model knows which word follows every other one: share kept of the words that it does not know, where half of all go.

    The decoder is a table of bigrams: one-hot embeddings, layers that add nothing, and an output layer that gives word i + 20 after word i
    with certainty, and chance else."""
    n = 20
    vocabulary = {f"w{i}": i for i in range(2 * n)} | {".": 2 * n, "\n": 2 * n + 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = len(vocabulary)
    config = Config(vocabulary=size, d_model=size, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2)
    model = Decoder(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.norm.weight.fill_(1)
    model.embedding.weight.copy_(torch.eye(size))
    model.lm_head.weight[range(n, 2 * n), range(n)] = 10.0
    draw = random.Random(0)
    told = [draw.randrange(n) for _ in range(30)]
    text = " ".join(f"w{i} w{i + n}" for i in told)
    ids = SelectiveContext().compressor(words, model).reduced(text, 0.5).ids.tolist()
    assert len(ids) >= 30
    claim("selective-context", "half-the-context-planted", sum(i < n for i in ids) / 30 - sum(i >= n for i in ids) / 30)
