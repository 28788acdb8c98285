"""Dynamic batch loading: weights by worked numbers, frequencies, and the authors' predicted losses."""

import math

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.pruning.domain_loading import (
    Domain,
    Loading,
    Watch,
    domain_weights,
    predicted_loss,
    text_loss,
)
from refimpl.model.train import next_token_loss
from tests.compression.conftest import decoder

# LLaMA-2's losses at 7, 13 and 70 billion parameters on the authors' seven domains, and what they predict from these for models of
# 1.3 and 0.37 billion (LLM-Shearing: scaling_law/reference_loss_estimation.ipynb, scripts/pruning.sh).
SIZES = (6738415616, 13015864320, 68976648192)
DOMAINS = {
    "cc": ((1.7520, 1.6680, 1.4621), 1.9643, 2.1401),
    "github": ((0.6216, 0.5791, 0.4890), 0.7459, 0.8694),
    "book": ((1.9063, 1.8242, 1.6450), 2.1393, 2.3625),
    "stackexchange": ((1.4482, 1.3936, 1.2805), 1.6117, 1.7791),
    "wiki": ((1.4844, 1.3945, 1.2118), 1.7590, 2.0470),
    "arxiv": ((1.2637, 1.2109, 1.1148), 1.4449, 1.6637),
    "c4": ((1.9219, 1.8486, 1.6848), 2.1251, 2.3139),
}


def test_weights_by_worked_numbers():
    """Oracle: by hand. Excesses of log 2, 0 and -1 over (0.5, 0.3, 0.2): (1, 0.3, 0.2) / 1.5; without the maximum the last counts
    0.2 / e."""
    weights, references = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64),
    )
    losses = torch.tensor([2 + math.log(2), 1.0, 2.0], dtype=torch.float64)
    assert_close(domain_weights(weights, losses, references).tolist(), [1 / 1.5, 0.2, 0.2 / 1.5])
    official = domain_weights(weights, losses, references, clip=False, smoothing=1e-4)
    total = 1 + 0.3 + 0.2 / math.e
    assert_close(official.tolist(), [(1 - 1e-4) * x / total + 1e-4 / 3 for x in (1.0, 0.3, 0.2 / math.e)])


def test_predicted_losses_are_the_authors():
    """Oracle: the authors' numbers, which they have from a fit by least squares, to their last digit."""
    for losses, _, smallest in DOMAINS.values():
        assert round(predicted_loss(SIZES, losses, 373867520), 4) == smallest
        assert_close(predicted_loss(SIZES, losses, SIZES[1]), losses[1], rtol=1e-9, atol=0)


def test_laws_by_hand():
    """Oracle: 1 + 8 / N^(1/2), and 5 - log N, the limit where the exponent is 0."""
    assert_close(predicted_loss((1, 4, 16), (9.0, 5.0, 3.0), 64), 2.0)
    three = [5 - math.log(n) for n in (1, 4, 16)]
    assert_close(predicted_loss((1, 4, 16), three, 64), 5 - math.log(64), rtol=1e-6, atol=0)
    for losses in ((1.0, 2.0, 3.0), (3.0, 2.0)):
        with pytest.raises(ValueError, match="must be three, the sizes rising, the losses falling"):
            predicted_loss((1, 4, 16), losses, 64)
    with pytest.raises(ValueError, match="follow no law"):
        predicted_loss((1, 4, 16), (3.0, 2.0, 2.0 - 1e-9), 64)


def test_texts_come_by_weight_and_in_order():
    """Oracle: frequencies, to three standard errors of 4000 draws; the texts of a domain one after the other, again from the start."""
    texts = torch.arange(30).view(5, 6)
    domains = {"a": Domain(texts=[texts[:2], texts[2:3]]), "b": Domain(texts=[{"tokens": texts[3:, :4]}])}
    loading = Loading(domains, torch.Generator().manual_seed(0))
    assert loading.weights.tolist() == [0.6, 0.4]
    loading.weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    batches = {isinstance(batch, dict): batch for batch in loading.draw(4000)}
    first, second = batches[False], batches[True]["tokens"]
    assert len(first) + len(second) == 4000
    assert abs(len(first) / 4000 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(first[:4], texts[[0, 1, 2, 0]]) and torch.equal(second[:3], texts[[3, 4, 3], :4])


def test_losses_and_references():
    """Oracle: the training loop's loss, over texts of two lengths; a reference that is given, and the model's own."""
    model, generator = decoder(), torch.Generator().manual_seed(0)
    long, short = (torch.randint(0, 61, (2, n), generator=generator) for n in (11, 6))
    with torch.no_grad():
        expected = (20 * next_token_loss(model, long) + 10 * next_token_loss(model, short)) / 30
        assert_close(text_loss(model, [long, short]), expected)
        domains = {"a": Domain(texts=[long], validation=[short]), "b": Domain(texts=[long], reference=1.5)}
        watch = Watch(model, domains)
        assert_close(watch.references.float(), torch.stack([next_token_loss(model, short), torch.tensor(1.5)]))
        loading = Loading(domains, generator)
        watch.update(model, loading)
        excess = max(0.0, float(next_token_loss(model, long)) - 1.5)
        assert_close(float(loading.weights[1]), math.exp(excess) / (1 + math.exp(excess)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({}, "domains is empty"),
        ({"a": Domain(texts=[])}, "domain 'a' has no texts"),
        ({"a": Domain(texts=[torch.ones(1, 1).long()])}, "no token with one before it"),
        ({"a": Domain(texts=torch.ones(1, 3).long())}, "must be a list of batches"),
        ({"a": Domain(texts=[torch.ones(1, 3).long()], weight=0.0)}, "must all be given and positive, or none"),
        (
            {"a": Domain(texts=[torch.ones(1, 3).long()], weight=1.0), "b": Domain(texts=[torch.ones(1, 3).long()])},
            "or none",
        ),
    ],
)
def test_domains_are_checked(domains, message):
    with pytest.raises(ValueError, match=message):
        Loading(domains, torch.Generator())
