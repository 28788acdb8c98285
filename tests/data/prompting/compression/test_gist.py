"""Gist: the new token, the loss by its formula, caches against the masked whole, and what a small training makes of it."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.packed_prompts import drawn
from refimpl.data.prompting.compression.gist import IGNORED, PADDING, Gist
from refimpl.data.prompting.compression.packed_prefix import Example
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

EXAMPLES = [Example([5, 7, 3], [8], [9, 1]), Example([6], [], [2]), Example([1, 2, 3, 4, 5], [4, 4], [3, 3, 10])]


def decoder(**shape):
    config = Config(
        **{"vocabulary": 11, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}
        | shape
    )
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).double()


@pytest.mark.parametrize("tied", [True, False])
def test_one_more_token_which_is_the_mean_of_all(tied):
    """Oracle: the mean, by hand; all else is as it was, and the model is left alone."""
    model = decoder(tied_embeddings=tied).requires_grad_(False)
    before = copy.deepcopy(model)
    made = Gist().prepare(model)
    assert made.config.vocabulary == made.embedding.num_embeddings == 12 and model.config.vocabulary == 11
    outputs = [made.embedding.weight] + ([] if tied else [made.lm_head.weight])
    olds = [model.embedding.weight] + ([] if tied else [model.lm_head.weight])
    for new, old in zip(outputs, olds, strict=True):
        assert_close(new[11], old.sum(0) / 11)
    tokens = torch.tensor([[1, 2, 3]])
    assert_close(made(tokens)[..., :11], model(tokens))
    assert all(p.requires_grad for p in made.parameters()) and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_batches_by_hand():
    """Oracle: by hand."""
    tokens, labels = Gist(tokens=2).batch(Gist().prepare(decoder()), EXAMPLES[:2])
    assert tokens.tolist() == [[5, 7, 3, 11, 11, 8, 9, 1], [*[PADDING] * 4, 6, 11, 11, 2]]
    assert labels.tolist() == [[*[IGNORED] * 6, 9, 1], [*[IGNORED] * 7, 2]]


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_loss_by_its_formula(condition, tokens):
    """Oracle: -log p of each answer's tokens, row by row without padding, a token at a time from the packed prompt; mean over all six."""
    method = Gist(tokens=tokens, condition=condition)
    model = method.prepare(decoder())
    total = 0.0
    for prompt, given, answer in EXAMPLES:
        cache = method.pack(model, [prompt]).cache()
        logits = model(torch.tensor([[*given, *answer]]), cache)[0].log_softmax(-1)
        n = len(given)
        if not n:  # the first answer's token is told by the gist itself, which sees the prompt in all conditions
            last = model(torch.tensor([[*prompt, *[11] * tokens]]))[0, -1:].log_softmax(-1)
            logits = torch.cat((last, logits))
            n = 1
        total -= sum(float(logits[n - 1 + i, token].detach()) for i, token in enumerate(answer))
    loss = method.loss(model, method.batch(model, EXAMPLES))
    assert loss.item() == pytest.approx(total / 6, rel=1e-6)  # the loss is summed in float32
    others = [Gist(tokens=tokens, condition=c) for c in ("gist", "positive", "negative") if c != condition]
    for other in others:  # negative control
        assert abs(other.loss(model, other.batch(model, EXAMPLES)).item() - loss.item()) > 1e-4


def test_without_a_gist_nothing_is_hidden():
    """Oracle: the plain decoder."""
    model = Gist().prepare(decoder())
    tokens = torch.tensor([[1, 2, 3, 4], [PADDING, 5, 6, 7]])
    found = Gist().logits(model, tokens)
    assert_close(found[0], model(tokens[:1])[0])
    assert_close(found[1, 1:], model(tokens[1:, 1:])[0])


def test_the_prompt_is_learnt_through_the_gist():
    """Oracle: the gradient of the answer's loss by the embedding of a token that stands in the prompt alone: none if all is hidden."""
    for condition, reaches in (("gist", True), ("positive", True), ("negative", False)):
        method = Gist(condition=condition)
        model = method.prepare(decoder(tied_embeddings=False))
        method.loss(model, method.batch(model, [EXAMPLES[0]])).backward()
        assert (model.embedding.weight.grad[7].abs().max() > 1e-6) == reaches
        assert (model.embedding.weight.grad[11].abs().max() > 1e-6) == reaches  # the gist token's own


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([Example([], [1], [2])], "example 0 has a prompt of 0 and an answer of 1 tokens"),
        ([EXAMPLES[0], Example([1], [1], [])], "example 1 has a prompt of 1 and an answer of 0 tokens"),
        ([Example([1, 11], [1], [2])], "example 0 holds 11, the gist token"),
        ([], "one is needed"),
    ],
)
def test_bad_examples_are_refused(examples, message):
    method = Gist()
    model = method.prepare(decoder())
    with pytest.raises(ValueError, match=message):
        method.batch(model, examples)


def test_bad_settings_and_prompts_are_refused():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1 gist token; the paper uses 1, 2, 5 and 10"):
        Gist(tokens=0)
    with pytest.raises(ValueError, match="condition='none' must be 'gist', 'positive' or 'negative'"):
        Gist(condition="none")
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="one is needed, and none may be empty"):
            Gist().pack(Gist().prepare(decoder()), prompts)


def trained(method, model, steps, rate):
    """A model that has learnt the arena's family of prompts: of 26 tokens, one says by how much the input is to be moved on."""
    generator = torch.Generator().manual_seed(2)
    batches = (method.batch(model, drawn(32, generator)) for _ in range(steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    train(model, optimizer, batches, steps, loss=method.loss, schedule=lambda p: min(1.0, 0.1 + 10 * p) * (1 - 0.9 * p))
    return model.eval()


def accuracy(method, model):
    """Share of right answers on prompts that were not seen, from the packed prompt."""
    examples = drawn(200, torch.Generator().manual_seed(7))
    cache = method.pack(model, [example.prompt for example in examples]).cache()
    said = generate(model, torch.tensor([example.input for example in examples]), 1, cache=cache)
    return float((said == torch.tensor([example.answer for example in examples])).float().mean())


@pytest.fixture(scope="module")
def accuracies():
    """A small decoder learns the family without a mask, and goes on from there under each mask. With weights as large as these at the start
    it does so for every seed.

    Under the negative one nothing says what the move is, so that no training brings more than one in four: a short one is enough.
    """
    config = Config(vocabulary=12, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64)
    start, model = Gist(condition="positive"), initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3)
    positive = trained(start, start.prepare(model), 70, 8e-3)
    found = {"positive": accuracy(start, positive)}
    for method, steps in ((Gist(), 90), (Gist(condition="negative"), 20)):
        found[method.condition] = accuracy(method, trained(method, copy.deepcopy(positive), steps, 6e-3))
    return found


def test_claim_as_good_as_the_prompt(accuracies, claim):
    """Accuracy with one gist token over that with the prompt."""
    claim("gist", "as-good-as-the-prompt", accuracies["gist"] / accuracies["positive"])


def test_claim_better_than_no_prompt(accuracies, claim):
    """Accuracy with one gist token over that without."""
    claim("gist", "better-than-no-prompt", accuracies["gist"] / accuracies["negative"])


def test_claim_storage(claim):
    """Bytes of a cache of the prompt over bytes of its gist."""
    method = Gist()
    model = method.prepare(decoder())
    whole, prompt = FullCache(), list(range(10)) * 2 + [1, 2, 3, 4, 5, 6]
    model.hidden(torch.tensor([prompt]), whole)
    claim("gist", "storage", whole.nbytes / method.pack(model, [prompt]).cache().nbytes)
