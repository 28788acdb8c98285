"""Beam search: against all continuations there are, against greedy decoding, and against transformers."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.model.beam import beam_search
from refimpl.model.config import Config
from refimpl.model.generate import generate, pad
from refimpl.model.load import load
from refimpl.model.model import Decoder, initialize_

SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}
SMALL = Config(vocabulary=5, **SIZES)
PROMPTS = [[1, 3, 2, 4, 0, 3], [2], [4, 4, 1]]


@pytest.fixture(params=[None, (None, 3)], ids=["full", "windows"])
def model(request, generator):
    config = SMALL if request.param is None else Config(**{**vars(SMALL), "sliding_window": request.param})
    return initialize_(Decoder(config), generator, std=0.5)


@torch.no_grad()
def all_continuations(model, prompt, n):
    """Every continuation, likeliest first, and its log-probability, without a cache."""
    tails = torch.tensor(list(itertools.product(range(5), repeat=n)))
    rows = torch.cat((torch.tensor([prompt]).expand(len(tails), -1), tails), 1)
    chances = model(rows[:, :-1]).log_softmax(-1)[:, len(prompt) - 1 :]
    scores = chances.gather(2, tails[:, :, None]).sum((1, 2))
    order = scores.argsort(descending=True)
    return tails[order], scores[order]


def test_with_a_beam_for_each_beginning_it_finds_the_best_of_all(model):
    """Oracle: all 5^4 continuations by enumeration; prompts alone, and padded in one batch."""
    tokens, padding = pad(PROMPTS)
    whole = beam_search(model, tokens, 4, 125, padding=padding)
    for row, prompt in enumerate(PROMPTS):
        tails, scores = all_continuations(model, prompt, 4)
        alone = beam_search(model, torch.tensor([prompt]), 4, 125)
        assert torch.equal(alone.tokens[0], tails[:125])
        assert_close(alone.scores[0], scores[:125], rtol=1e-5, atol=1e-5)
        assert torch.equal(whole.tokens[row, :20], tails[:20])
        assert_close(whole.scores[row], alone.scores[0], rtol=1e-5, atol=1e-5)


def test_a_narrow_beam_step_by_step(model):
    """Oracle: the definition in loops, without a cache: extend each beginning by each token, keep the best three."""
    for prompt in PROMPTS:
        kept = [((), 0.0)]
        for _ in range(6):
            longer = []
            for tail, score in kept:
                with torch.no_grad():
                    chances = model(torch.tensor([[*prompt, *tail]]))[0, -1].log_softmax(-1)
                longer += [((*tail, token), score + float(chances[token])) for token in range(5)]
            kept = sorted(longer, key=lambda pair: -pair[1])[:3]
        found = beam_search(model, torch.tensor([prompt]), 6, 3)
        assert found.tokens[0].tolist() == [list(tail) for tail, _ in kept]
        assert found.scores[0].tolist() == pytest.approx([score for _, score in kept], abs=1e-4)


def test_one_beam_is_greedy_and_more_find_better_text(generator):
    """Oracle: `generate`; by the model's own measure, five beams find a likelier text than one for some prompts."""
    model = initialize_(Decoder(Config(vocabulary=61, **SIZES)), generator, std=0.5)
    prompts = torch.randint(0, 61, (8, 5), generator=generator)
    one, five = (beam_search(model, prompts, 12, beams) for beams in (1, 5))
    assert torch.equal(one.tokens[:, 0], generate(model, prompts, 12))
    assert (five.scores[:, 0] - one.scores[:, 0]).max() > 0.1


def test_what_has_ended_stays_as_it_is(model):
    """Oracle: enumeration of all texts up to four tokens that end at the first 0 or at the fourth token."""
    for prompt in PROMPTS:
        tails, scores = all_continuations(model, prompt, 4)
        ends = {}
        for tail, score in zip(tails.tolist(), scores.tolist(), strict=True):
            cut = tuple(tail[: tail.index(0) + 1] if 0 in tail else tail)
            ends[cut] = torch.logaddexp(torch.tensor(ends.get(cut, -torch.inf)), torch.tensor(score)).item()
        best = sorted(ends.items(), key=lambda pair: -pair[1])[:7]
        found = beam_search(model, torch.tensor([prompt]), 4, 125, stop={0})
        assert found.tokens[0, :7].tolist() == [[*tail, *[0] * (4 - len(tail))] for tail, _ in best]
        assert found.scores[0, :7].tolist() == pytest.approx([score for _, score in best], abs=1e-4)
    always = beam_search(model, torch.tensor([[1]]), 9, 3, stop=range(5))
    assert always.tokens.shape == (1, 3, 1)  # every token ends: one step


def test_few_continuations_are_all_returned(model):
    """Oracle: counting: 5 tokens of vocabulary, one step: 5; two: 25."""
    assert beam_search(model, torch.tensor([[1]]), 1, 9).tokens.shape == (1, 5, 1)
    found = beam_search(model, torch.tensor([[1]]), 2, 99)
    assert found.tokens.shape == (1, 25, 2)
    assert_close(found.scores.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_same_as_transformers(checkpoint, kind):
    """Peer: transformers 5.23.0, five beams without a penalty of length, all five returned."""
    peer, folder = checkpoint(kind)
    prompts = torch.tensor([[5, 7, 33, 2], [8, 1, 1, 30]])
    theirs = peer.generate(
        prompts, num_beams=5, num_return_sequences=5, max_new_tokens=9, do_sample=False, length_penalty=0.0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(beam_search(load(folder), prompts, 9, 5).tokens.flatten(0, 1), theirs[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([[1]]), 2, 0), "beams=0 must be at least 1"),
        ((torch.tensor([[1]]), 0, 2), "n=0 must be at least 1"),
        ((torch.tensor([[7]]), 2, 2), "the vocabulary from 0 to 4"),
        ((torch.tensor([1]), 2, 2), "must be \\[batch, time\\]"),
    ],
)
def test_what_does_not_fit_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_search(model, *arguments)
