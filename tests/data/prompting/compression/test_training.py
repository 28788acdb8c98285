"""The loss and its gradient in closed form, labels by hand, and a classifier that a few seconds of training make useful."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close

from refimpl.data.prompting.compression.annotation import annotate, trusted
from refimpl.data.prompting.compression.token_classifier import load
from refimpl.data.prompting.compression.training import (
    IGNORED,
    classification_loss,
    labelled,
    main,
    small_encoder,
    stacked,
    train_classifier,
)
from refimpl.testbed.pairs import pairs
from refimpl.testbed.tokenizer import CHECKPOINT, tokenizer

TEXTS = [([3, 1, 4], [1, 0, 1]), ([5], [1]), ([9, 2], [0, 0])]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_by_hand():
    tokens, labels = stacked(TEXTS)
    assert tokens.tolist() == [[3, 1, 4], [0, 0, 5], [0, 9, 2]]
    assert labels.tolist() == [[1, 0, 1], [IGNORED, IGNORED, 1], [IGNORED, 0, 0]]


def test_loss_is_the_mean_over_tokens():
    """Oracle: the formula, -log p of each token's own label, each text alone, divided by the 6 tokens of all."""
    classifier, _ = train_classifier(TEXTS, small_encoder(11, 16, 1), seeded(), steps=3, rate=0.1)
    total = 0.0
    for tokens, labels in TEXTS:
        p = classifier.probabilities([tokens])[0].double()
        total -= sum(math.log(x if y else 1 - x) for x, y in zip(p.tolist(), labels, strict=True))
    assert classification_loss(classifier, stacked(TEXTS)).item() == pytest.approx(total / 6, rel=1e-5)


def test_gradient_in_closed_form():
    """Oracle: the derivative of cross-entropy by the bias is the mean of p - y, and by the weight that of (p - y) h."""
    classifier, _ = train_classifier(TEXTS, small_encoder(11, 16, 1), seeded(), steps=3, rate=0.1)
    classifier.double().zero_grad()
    classification_loss(classifier, stacked(TEXTS)).backward()
    bias, weight = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)
    for tokens, labels in TEXTS:
        hidden = classifier.encoder.hidden(torch.tensor([tokens]))[0].detach()
        p = (hidden @ classifier.head.weight.T + classifier.head.bias).softmax(-1).detach()
        off = p - torch.nn.functional.one_hot(torch.tensor(labels), 2)
        bias, weight = bias + off.sum(0) / 6, weight + off.T @ hidden / 6
    # the loss is computed in float32 whatever the parameters are
    assert_close(classifier.head.bias.grad, bias, rtol=1e-5, atol=1e-6)
    assert_close(classifier.head.weight.grad, weight, rtol=1e-5, atol=1e-6)
    assert bias.abs().max() > 1e-3


def test_tokens_have_their_words_label():
    """Oracle: by hand. All tokens of a word that stays are 1, its spaces included; the line's end is a word of its own."""
    text = "def main():\n    load_file(Anna, 42)\n"
    ((ids, labels),) = labelled([annotate(text, "load_file 42 \n")], tokenizer())
    assert tokenizer().decode(ids) == text
    kept = tokenizer().decode([token for token, label in zip(ids, labels, strict=True) if label])
    assert kept == "    load_file 42\n" and sum(labels) > 6  # which has more tokens than words


def test_texts_that_a_tokenizer_reads_as_nothing_are_left_out():
    words = Tokenizer(models.WordLevel({"dog": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert labelled([annotate("  ", ""), annotate("a dog", "dog")], words) == [([1, 0], [0, 1])]


def test_training_needs_texts_and_repeats_from_a_seed():
    """Oracle: itself from the same seed; another seed gives other weights."""
    with pytest.raises(ValueError, match="texts is empty"):
        train_classifier([], small_encoder(11, 16, 1), seeded(), steps=1)
    one, two, other = (
        train_classifier(TEXTS, small_encoder(11, 16, 1), seeded(seed), steps=4, batch=2)[0] for seed in (0, 0, 1)
    )
    assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)
    assert not torch.equal(one.encoder.embedding.weight, other.encoder.embedding.weight)


def test_a_few_seconds_of_training_are_better_than_chance():
    """Oracle: labels of texts that it has not seen. Always saying "discard" has F1 of 0, a coin that of 2s / (1 + 2s) at share s."""
    known, unseen = (
        labelled(
            trusted(annotate(o, c, window=len(o)) for o, c in pairs(n, 320, seeded(seed), split="held-out")),
            tokenizer(),
        )
        for n, seed in ((35, 0), (14, 5))
    )
    classifier, losses = train_classifier(known, small_encoder(tokenizer().get_vocab_size(), 32), seeded(), steps=40)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # the head starts at zero
    says = torch.cat(classifier.probabilities([tokens for tokens, _ in unseen])) > 0.5
    keep = torch.cat([torch.tensor(labels) for _, labels in unseen]).bool()
    share = float(keep.float().mean())
    f1 = float(2 * (says & keep).sum() / (says.sum() + keep.sum()))
    assert f1 > 1.3 * (2 * share / (1 + 2 * share))
    assert float((says == keep).float().mean()) > 1 - share + 0.02


def test_the_command_trains_on_a_file_of_pairs(tmp_path, capsys):
    file, out = tmp_path / "pairs.jsonl", tmp_path / "c.safetensors"
    file.write_text("".join(json.dumps(["The dog, it barked.", "dog barked"]) + "\n" for _ in range(3)))
    main([str(file), str(CHECKPOINT), str(out), "--steps", "2"])
    assert capsys.readouterr().out.startswith("3 of 3 pairs; loss of the last 2 steps 0.6")
    classifier, known = load(out)
    assert classifier.encoder.config.vocabulary == known.get_vocab_size() == 2048
