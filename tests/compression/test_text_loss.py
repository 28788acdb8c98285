"""The loss on calibration texts: transformers' own loss, and positions that do not count."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.text_loss import check_texts, loss_of, mean_loss, n_rows, next_tokens, repeated, rows_of
from refimpl.model.train import next_token_loss, perplexity
from tests.compression.conftest import decoder, llama


@torch.no_grad()
def test_loss_is_that_of_transformers(tokens):
    """Oracle: transformers' loss of its Llama, with padding on the left and labels that leave positions out."""
    model, mask = llama(), torch.ones_like(tokens)
    mask[1, :4] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[2, 5] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    losses = loss_of(model, batch)
    assert losses.shape == (3, 10)
    assert_close(losses.sum() / (labels[:, 1:] != -100).sum(), model(**batch).loss)
    assert (losses[1, :3] == 0).all() and losses[2, 4] == 0 and losses[2, 5] > 0


@torch.no_grad()
def test_loss_is_that_of_the_training_loop(tokens):
    """Oracle: `refimpl.model.train`, which has its own; as tensor and as dict."""
    model = decoder()
    for batch in (tokens, {"tokens": tokens}):
        assert_close(loss_of(model, batch).mean(), next_token_loss(model, tokens))
    expected = torch.tensor(perplexity(model, tokens.flatten(), 11))  # in float32, as the losses are
    assert_close(loss_of(model, tokens).mean().exp(), expected)


def test_labels_by_hand():
    """Oracle: by hand. What is padding is no label, and nothing is predicted from it."""
    tokens = torch.tensor([[7, 8, 9, 5]])
    assert next_tokens(tokens).tolist() == [[8, 9, 5]]
    assert next_tokens({"tokens": tokens, "padding": torch.tensor([2])}).tolist() == [[-100, -100, 5]]
    right = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert next_tokens(right).tolist() == [[8, -100, -100]]


@torch.no_grad()
def test_rows_and_repetitions(tokens):
    """Oracle: the whole batch's losses. Masks go with their rows."""
    model = decoder()
    batch = {"tokens": tokens, "padding": torch.tensor([0, 3, 1]), "cache": None}
    whole = loss_of(model, batch)
    assert_close(torch.cat([loss_of(model, rows) for rows in rows_of(batch)]), whole)
    assert [n_rows(rows) for rows in rows_of(batch, 2)] == [2, 1]
    assert_close(loss_of(model, repeated(batch, 2)), whole.repeat(2, 1))
    assert repeated(tokens, 2).tolist() == torch.cat([tokens, tokens]).tolist()


@pytest.mark.parametrize("batch", [torch.ones(2, 3), torch.tensor([1, 2]), {"pixels": torch.ones(1)}])
def test_what_holds_no_tokens_is_refused(batch):
    with pytest.raises(ValueError, match=r"calibration batch 4 must hold tokens \[batch, time\]"):
        next_tokens(batch, 4)


def test_models_without_logits_are_refused():
    with pytest.raises(ValueError, match="must return logits"):
        loss_of(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), torch.tensor([[1, 2]]))


@torch.no_grad()
def test_mean_is_over_what_counts(tokens):
    """Oracle: transformers' loss; data without a token to predict is refused, and a loss that is none."""
    model, mask = llama(), torch.ones_like(tokens)
    mask[1, 4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    assert_close(mean_loss(model, batch), model(**batch, labels=tokens.masked_fill(mask == 0, -100)).loss)
    check_texts([tokens[:, :1], tokens])
    with pytest.raises(ValueError, match="no token with one before it"):
        check_texts([tokens[:, :1]])
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss on calibration batch 3 is nan"):
        mean_loss(model, tokens, 3)
