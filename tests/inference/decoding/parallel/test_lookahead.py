"""Lookahead: steps against lists and whole forwards, n-grams by hand, draws against exact chances, calls on code."""

import pytest
import torch

from refimpl.inference.decoding.draft_and_verify import Rows
from refimpl.inference.decoding.parallel import lookahead as module
from refimpl.inference.decoding.parallel.lookahead import Lookahead, _Window
from refimpl.model.generate import generate
from tests.inference.decoding.chances import chances, markov, number, p_value, tiny
from tests.inference.decoding.unseen import unseen_text

# Steps


class Lists:
    """The algorithm over lists, one text, a whole forward for every place: nothing is batched, masked or cached."""

    def __init__(self, target, w, n, g, begin):
        self.target, self.w, self.n, self.g = target, w, n, g
        self.past, self.pool = [begin], {}  # levels of the window, the first without the last token's own place

    @torch.no_grad()
    def says(self, text):
        return int(self.target(torch.tensor([text]))[0, -1].argmax())

    def step(self, text):
        """Tokens that are taken, and guesses that were looked at."""
        full, last = len(self.past) == self.n - 1, text[-1]
        grams = list(self.pool.get(last, [])) if full else []
        levels = [[last, *self.past[0]], *self.past[1:]]
        new = [
            self.says(text[:-1] + levels[0][: j + 1] + [level[j] for level in levels[1:]])
            for j in range(len(levels[0]))
        ]
        taken = []
        while True:
            taken.append(self.says(text + taken))
            if len(taken) == self.n or not any(list(gram[: len(taken)]) == taken for gram in grams):
                break
        if full:
            for j in range(self.w):
                first, *rest = [level[j] for level in levels] + [new[j]]
                held = self.pool.setdefault(first, [])
                held[:] = [*[gram for gram in held if gram != rest], rest][-self.g :]
            self.past = [levels[1][1:], *levels[2:], new] if self.n > 2 else [new[1:]]
        else:
            self.past = [self.past[0][1:], *[level[1:] for level in self.past[1:]], new[1:]]
        return taken, sum(map(len, grams))


@pytest.mark.parametrize(
    ("target", "w", "n", "g"),
    [("full", 7, 5, 7), ("windows", 3, 3, 2), ("qwen", 4, 2, 3), ("full", 1, 4, 1)],
    indirect=["target"],
)
def test_steps_are_those_of_lists(target, w, n, g):
    """Oracle: the algorithm over lists with whole forwards: tokens, calls, guesses and those that stood, of 40 tokens."""
    prompt, method = [5, 7, 33, 2], Lookahead(window=w, ngram=n, guesses=g)
    begin = _Window(method, target, torch.tensor([prompt]), None, ()).window[0, 0, 1:].tolist()
    assert len(begin) == w + n - 3 and set(begin) <= set(prompt)
    lists, text, calls, guessed = Lists(target, w, n, g, begin), list(prompt), 0, 0
    while len(text) < 44:
        taken, some = lists.step(text)
        guessed += min(some, some // (n - 1) * (43 - len(text)))  # of each n-gram, what there is room for
        text, calls = text + taken, calls + 1
    decoded = Lookahead(window=w, ngram=n, guesses=g).decode(target, torch.tensor([prompt]), 40)
    assert decoded.tokens[0].tolist() == text[4:44]
    assert (decoded.target_calls, int(decoded.drafted)) == (calls, guessed)
    assert int(decoded.accepted) == 40 - calls


def test_a_counting_target_by_hand():
    """Oracle: by hand. The target counts 0 to 4 round and round; the prompt's n-grams are known, so that guesses are right.

    N = 4: two calls fill the window and give a token each; then 4 tokens a call. With N = 2 one from the first call, which reads the
    prompt, then 2.
    """
    table = torch.full((5, 5), 1e-6)
    table[torch.arange(5), (torch.arange(5) + 1) % 5] = 1
    target, prompt = markov(table / table.sum(1, keepdim=True)), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    decoded = Lookahead(ngram=4, from_prompt=True).decode(target, prompt, 14)
    assert decoded.tokens.tolist() == [[4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert decoded.target_calls == 5 and decoded.accepted.tolist() == [9] and decoded.rejected.tolist() == [0]
    assert Lookahead(ngram=2, from_prompt=True).decode(target, prompt, 14).target_calls == 8
    assert Lookahead(ngram=4, window=1).decode(target, prompt, 14).target_calls > 5  # control


def test_the_last_grams_seen_stay(target):
    """Oracle: by hand: of three under one first token with room for two, the one that was seen again stays."""
    window = _Window(Lookahead(guesses=2, ngram=3), target, torch.tensor([[5]]), None, ())
    pool = {}
    for gram in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [1, 6, 7], [8, 2, 3]):
        window._remember(pool, [gram])
    assert pool == {1: [(2, 3), (6, 7)], 8: [(2, 3)]}


def test_grams_of_the_text_are_all_that_stand_in_it():
    """Oracle: by hand: those of the prompts, then those that end in what came, whole or in part; none of the padding, nor is it drawn."""
    tokens, padding = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]]), torch.tensor([2, 0])
    window = _Window(Lookahead(ngram=3, from_prompt=True), None, tokens, padding, ())
    rows = Rows.begin(tokens, 4, ())
    window.propose(rows)
    assert window.pools == [{1: [(2, 3)]}, {4: [(5, 6)], 5: [(6, 7)], 6: [(7, 8)]}]
    rows.append(torch.tensor([[9], [9]]), torch.tensor([1, 0]), torch.tensor([1, 5]))
    window.propose(rows)
    assert window.pools == [
        {1: [(2, 3)], 2: [(3, 9)], 3: [(9, 1)]},
        {4: [(5, 6)], 5: [(6, 7)], 6: [(7, 8)], 7: [(8, 5)]},
    ]
    drawn = window._random(rows.text, rows.lengths, 200)
    assert [{*row} for row in drawn.tolist()] == [{1, 2, 3, 9}, {4, 5, 6, 7, 8}]


def test_what_follows_an_end_is_not_kept(target):
    """Oracle: by construction: a stop token that the target says everywhere does not come into the window."""
    method = Lookahead(window=3, ngram=3)
    tokens = torch.tensor([[5, 7, 33], [1, 2, 60]])
    said = int(generate(target, tokens, 1)[0, 0])
    window = _Window(method, target, tokens, None, {said})
    rows = Rows.begin(tokens, 9, {said})
    guesses = window.propose(rows)
    hidden = target.hidden(tokens)[:1, -1:].expand(2, len(guesses.tree.parents), -1)
    window.learn(rows, guesses, hidden, torch.zeros(2, 1), torch.zeros(2))
    assert window.window.shape == (2, 2, 3)
    assert not (window.window[:, -1] == said).any()
    assert all(set(row.tolist()) <= set(text.tolist()) for row, text in zip(window.window[:, -1], tokens, strict=True))


def test_a_call_is_as_wide_as_the_window_and_its_guesses(target, monkeypatch):
    """Oracle: the official code's count: (N - 1)(W + G) tokens at most, the last one of the text among them."""
    widths, read = [], target.hidden

    def spy(tokens, *args, **kwargs):
        widths.append(tokens.shape[1])
        return read(tokens, *args, **kwargs)

    monkeypatch.setattr(target, "hidden", spy)
    Lookahead(window=5, ngram=4, guesses=3).decode(target, torch.tensor([[5, 7, 33]]), 60)
    assert widths[:3] == [3 + 6, 2 * 6, 3 * 5]  # the prompt and 6 places ahead; two levels; full, and no guesses yet
    assert max(widths) <= 3 * (5 + 3) and max(widths) > 3 * 5


# Whole texts


def test_texts_have_the_targets_chances(generator, claim):
    """Oracle: the chance of each of 64 texts, by the whole forward over all of them; a chi-square over 3,000 draws.

    With n-grams of the prompt and without; temperatures on both sides of 1; false alarm 1e-4 each.
    """
    target, prompt, worst = tiny(generator), [1, 3, 0, 1, 2, 1, 3, 2, 1], 1.0
    tokens = torch.tensor([prompt]).expand(3_000, -1)
    for settings, temperature in (({"from_prompt": True}, 1.0), ({"from_prompt": True}, 0.6), ({}, 1.7)):
        method = Lookahead(window=3, ngram=2, **settings)
        decoded = method.decode(target, tokens, 3, temperature=temperature, generator=generator)
        counts = number(decoded.tokens, 4).bincount(minlength=64)
        worst = min(worst, p_value(counts, chances(target, prompt, 3, temperature)))
        assert 0.1 < decoded.acceptance < 0.95
    claim("lookahead", "exact", worst)


def test_guesses_that_stand_too_often_would_be_found_out(generator, monkeypatch):
    """Negative control of the test above: the same draws, where a token that nobody guessed is drawn once more."""
    target, prompt = tiny(generator), [1, 3, 0, 1, 2, 1, 3, 2, 1]

    def twice(guesses, hidden, choose):
        first, second = (choose(hidden[:, 0]) for _ in range(2))
        guessed = ((guesses.tokens == first[:, None]) & guesses.open).any(1)
        return (
            torch.zeros(len(hidden), 1, dtype=torch.int64),
            torch.zeros_like(first),
            torch.where(guessed, first, second),
        )

    monkeypatch.setattr(module, "follow", twice)
    tokens = torch.tensor([prompt]).expand(3_000, -1)
    decoded = Lookahead(window=3, ngram=2, from_prompt=True, guesses=1).decode(
        target, tokens, 3, temperature=1.0, generator=generator
    )
    assert p_value(number(decoded.tokens, 4).bincount(minlength=64), chances(target, prompt, 3, 1.0)) < 1e-9


# How many tokens a call gives


@pytest.fixture(scope="module")
def tokens_a_call():
    """Of the testbed's model on four pieces of text that it has not seen, by W = G."""
    model, prompts = unseen_text()
    plain = generate(model, prompts, 32)

    def count(width):
        decoded = Lookahead(window=width, guesses=width).decode(model, prompts, 32)
        assert torch.equal(decoded.tokens, plain)
        return decoded.tokens.numel() / int(decoded.rounds.sum())

    return {width: count(width) for width in (1, 2, 4, 8)}


def test_calls_that_are_spared(tokens_a_call, claim):
    """Oracle: plain decoding's tokens, in one call each; calls are counted."""
    claim("lookahead", "fewer-calls", tokens_a_call[8])


def test_more_work_a_call_is_fewer_calls(tokens_a_call, claim):
    """Oracle: none but the count: the correlation of tokens a call with the logarithm of the tokens that a call reads."""
    work = torch.tensor([4.0 * 2 * width for width in tokens_a_call]).log()
    claim(
        "lookahead",
        "logarithm-of-work",
        float(torch.corrcoef(torch.stack((work, torch.tensor([*tokens_a_call.values()]))))[0, 1]),
    )


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("ngram", 1), ("guesses", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        Lookahead(**{name: value})
