"""PromptLookup: places against a plain search and transformers', calls on real text, draws against exact chances."""

import re
from types import SimpleNamespace

import pytest
import torch

from refimpl.inference.decoding.speculative import prompt_lookup as module
from refimpl.inference.decoding.speculative.prompt_lookup import PromptLookup, lookup
from refimpl.model.generate import generate, pad
from refimpl.testbed.corpus import documents
from refimpl.testbed.tokenizer import tokenizer
from tests.inference.decoding.chances import chances, markov, number, p_value, tiny


def search(row, ngram, guesses):
    """The first place, by comparing lists; None if there is none."""
    for size in range(min(ngram, len(row)), 0, -1):
        for place in range(len(row)):
            start = place + size
            enough = start + guesses <= len(row) and start < len(row) - size
            if enough and row[place:start] == row[-size:]:
                return start
    return None


# Places


@pytest.mark.parametrize(("ngram", "guesses"), [(3, 10), (3, 1), (2, 2), (1, 4), (5, 3)])
def test_places_are_those_of_a_plain_search(generator, ngram, guesses):
    """Oracle: lists compared one by one; 200 rows of different lengths and paddings, over 4 tokens so that much matches."""
    text = torch.randint(0, 4, (200, 30), generator=generator)
    padding = torch.randint(0, 12, (200,), generator=generator)
    lengths = (padding + 1 + torch.randint(0, 18, (200,), generator=generator)).clamp(max=30)
    found, start = lookup(text, lengths, ngram, guesses, padding)
    for row, left, length, is_found, at in zip(text.tolist(), padding, lengths, found, start, strict=True):
        expected = search(row[left:length], ngram, guesses)
        assert (int(at - left) if is_found else None) == expected
    assert 0.1 < found.float().mean() < 0.99  # control: both outcomes occur


def test_places_are_those_of_transformers(generator):
    """Peer: transformers 5.23.0, `PromptLookupCandidateGenerator`, 300 texts over 6 tokens, of which most have a match.

    It takes a place with fewer tokens behind it than asked for; where it found one with all of them, so does this.
    """
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    theirs = PromptLookupCandidateGenerator(num_output_tokens=6, max_matching_ngram_size=3, max_length=100)
    agreed = 0
    for row in torch.randint(0, 6, (300, 1, 24), generator=generator):
        guesses = theirs.get_candidates(row)[0][0, 24:]
        found, start = lookup(row, torch.tensor([24]), 3, 6)
        if len(guesses) == 6:
            assert found and torch.equal(row[0, start : start + 6], guesses)
            agreed += 1
    assert agreed > 100


def test_longer_ends_come_first_and_the_first_place_of_them():
    """Oracle: by hand. `1 2` stands twice before; a `2` stands earlier still, and is looked up only if pairs are not."""
    row = torch.tensor([[2, 9, 9, 1, 2, 7, 7, 1, 2, 8, 8, 1, 2]])
    length = torch.tensor([13])
    assert lookup(row, length, 3, 2)[1].item() == 5
    assert lookup(row, length, 1, 2)[1].item() == 1
    assert lookup(row, length, 3, 9)[1].item() == 1  # behind the pairs there are 8 tokens and 4
    assert not lookup(row, length, 3, 13)[0]


def test_padding_is_no_text():
    """Oracle: by hand: the only match of the end lies in the padding."""
    row, length = torch.tensor([[5, 6, 7, 1, 2, 5]]), torch.tensor([6])
    assert lookup(row, length, 3, 2)[0] and not lookup(row, length, 3, 2, torch.tensor([1]))[0]


# Whole texts


def test_calls_by_hand():
    """Oracle: by hand. The target counts 0 to 4 round and round; the prompt has all of it once and the next 0, 1, 2."""
    table = torch.full((5, 5), 1e-6)
    table[torch.arange(5), (torch.arange(5) + 1) % 5] = 1
    prompt = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    target = markov(table / table.sum(1, keepdim=True))
    decoded = PromptLookup(guesses=4).decode(target, prompt, 12)
    assert decoded.tokens.tolist() == [[3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert decoded.target_calls == 3 and decoded.draft_calls == 0
    assert decoded.drafted.tolist() == [9] and decoded.accepted.tolist() == [
        9
    ]  # 4, 4, and the 1 that there is room for
    assert decoded.widths.tolist() == [5, 5, 2]
    # of 9 guesses: after 3 calls of one token each the end is a 0, and behind the first 0 stand 10 tokens; 8 have room
    decoded = PromptLookup(guesses=9).decode(target, prompt, 12)
    assert decoded.rounds.tolist() == [4] and decoded.drafted.tolist() == [8]
    assert decoded.widths.tolist() == [1, 1, 1, 9]  # where nothing is found, nothing but the last token is read


def test_a_short_prompt_has_nothing_to_look_up(target):
    """Oracle: `generate`; one token, then more, until something repeats."""
    prompt = torch.tensor([[7]])
    decoded = PromptLookup(ngram=5, guesses=1).decode(target, prompt, 40)
    assert torch.equal(decoded.tokens, generate(target, prompt, 40))


def test_texts_have_the_targets_chances(generator, claim):
    """Oracle: the chance of each of 64 texts, by the whole forward over all of them; a chi-square over 10,000 draws.

    The prompt repeats itself, so that there are guesses in every row; temperatures on both sides of 1; false alarm 1e-4 each.
    """
    target, prompt, worst = tiny(generator), [1, 3, 0, 1, 3, 2, 1, 3], 1.0
    tokens = torch.tensor([prompt]).expand(10_000, -1)
    for temperature in (1.0, 0.6, 1.7):
        decoded = PromptLookup(guesses=2).decode(target, tokens, 3, temperature=temperature, generator=generator)
        counts = number(decoded.tokens, 4).bincount(minlength=64)
        worst = min(worst, p_value(counts, chances(target, prompt, 3, temperature)))
        assert int(decoded.drafted.min()) >= 2 and 0.05 < decoded.acceptance < 0.95
    claim("prompt-lookup", "exact-distribution", worst)


def test_guesses_that_all_stand_would_be_found_out(generator, monkeypatch):
    """Negative control of the test above: the same draws, by a rule that keeps every guess."""
    target, prompt = tiny(generator), [1, 3, 0, 1, 3, 2, 1, 3]

    def always(draft, logits, *, temperature, generator):
        p = (logits / temperature).softmax(-1)[torch.arange(len(logits)), draft.counts]
        return draft.counts, torch.multinomial(p, 1, generator=generator).squeeze(1)

    monkeypatch.setattr(module, "accept_sampled", always)
    tokens = torch.tensor([prompt]).expand(10_000, -1)
    decoded = PromptLookup(guesses=2).decode(target, tokens, 3, temperature=1.0, generator=generator)
    assert p_value(number(decoded.tokens, 4).bincount(minlength=64), chances(target, prompt, 3, 1.0)) < 1e-9


@pytest.mark.parametrize("target", ["windows"], indirect=True)
def test_rows_of_a_batch_look_up_their_own_text(target):
    """Oracle: each prompt alone: the same guesses, calls and tokens."""
    prompts = [[5, 7, 33, 2, 60, 5, 7, 33, 2], [8, 8, 8, 8], [3, 41, 5, 3, 41]]
    tokens, padding = pad(prompts)
    together = PromptLookup(guesses=2).decode(target, tokens, 25, padding=padding)
    for i, prompt in enumerate(prompts):
        alone = PromptLookup(guesses=2).decode(target, torch.tensor([prompt]), 25)
        assert alone.tokens.tolist() == together.tokens[i : i + 1].tolist()
        for name in ("rounds", "drafted", "accepted", "rejected"):
            assert getattr(alone, name).item() == getattr(together, name)[i]


# How many tokens a call gives


class Writer(torch.nn.Module):
    """What a decoder is to the loop: one that writes this text, whatever it has read."""

    def __init__(self, text, vocabulary):
        super().__init__()
        self.text, self.config = text, SimpleNamespace(vocabulary=vocabulary)

    def hidden(self, tokens, cache, padding):
        places = cache.length + torch.arange(tokens.shape[1])[None, :, None]
        nothing = torch.zeros(1, 1, tokens.shape[1], 1)
        cache.update(0, nothing, nothing, nothing, places[..., 0])
        return places

    def logits(self, places):
        following = self.text[(places[..., 0] + 1).clamp(max=len(self.text) - 1)]
        return torch.nn.functional.one_hot(following, self.config.vocabulary).float()


def tokens_a_call(prompt, answer):
    """Of a target that writes `answer`."""
    encoder = tokenizer()
    read, written = (torch.tensor(encoder.encode(text).ids) for text in (prompt, answer))
    target = Writer(torch.cat((read, written)), encoder.get_vocab_size())
    decoded = PromptLookup().decode(target, read[None], len(written))
    assert torch.equal(decoded.tokens[0], written)
    return len(written) / decoded.target_calls


@pytest.fixture(scope="module")
def modules():
    """Parts of four modules of the standard library, 1,000 characters each, from their first function or class on."""
    code = [text for name, text in documents("held-out").items() if name.endswith(".py")]
    starts = [re.search(r"^(def|class) ", text, re.MULTILINE) for text in code]
    parts = [text[at.start() :][:1000] for text, at in zip(code, starts, strict=True) if at]
    return [part for part in parts if len(part) == 1000][:4]


def edited(code):
    """The code with its most frequent long name changed, as an answer to who asked for it."""
    names = re.findall(r"[A-Za-z_]{6,}", code)
    return re.sub(rf"\b{max(sorted(set(names)), key=names.count)}\b", "renamed", code)


@pytest.fixture(scope="module")
def copying(modules):
    """Tokens a call on real code that is written again with a name changed throughout, the mean over modules."""
    return sum(tokens_a_call(code, edited(code)) for code in modules) / len(modules)


def test_code_that_is_edited_takes_few_calls(copying, claim):
    """Oracle: the text itself, which the target writes whatever was guessed."""
    claim("prompt-lookup", "calls-when-copying", copying)


def test_text_that_copies_nothing_gains_little(modules, copying, claim):
    """Oracle: as above; another module's code, which shares the language with the prompt, not the text."""
    pairs = zip(modules, modules[1:] + modules[:1], strict=True)
    other = sum(tokens_a_call(one, other) for one, other in pairs) / len(modules)
    claim("prompt-lookup", "depends-on-copying", copying / other)


@pytest.mark.parametrize(("name", "value"), [("ngram", 0), ("guesses", 0), ("guesses", -2)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        PromptLookup(**{name: value})
