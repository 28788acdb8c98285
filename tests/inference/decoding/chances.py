"""Exact chances of short texts, models whose chances are known, and the test that holds draws against chances."""

import itertools

import torch

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

FALSE_ALARM = 1e-4  # how often a right decoder would fail one of these tests, if its seed were drawn anew


def p_value(counts, chances):
    """Chance of draws as far from these chances as `counts` are or farther: Pearson's chi-square.

    Cells of fewer than 5 expected draws count as one.
    """
    expected = chances.double() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts.double(), expected))
    statistic = ((counts - expected).square() / expected)[expected > 0].sum()
    degrees = (expected > 0).sum() - 1
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def same_source(first, second):
    """Chance of two counts as different as these or more, if both were drawn from one distribution."""
    both = torch.stack((first, second)).double()
    expected = both.sum(1, keepdim=True) * both.sum(0) / both.sum()
    kept = expected.amin(0) > 0
    statistic = ((both - expected).square() / expected)[:, kept].sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2))


@torch.no_grad()
def chances(model, prompt, n, temperature):
    """Of every text of n tokens after a prompt, `[vocabulary ** n]`, by the whole forward over each of them."""
    vocabulary = model.config.vocabulary
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=n)))
    whole = torch.cat((torch.tensor([prompt]).expand(len(texts), -1), texts), dim=1)
    logits = model(whole)[:, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(2, texts[..., None]).sum((1, 2)).exp()


def number(texts, vocabulary):
    """Texts `[batch, n]` as indices into `chances`."""
    return (texts * vocabulary ** torch.arange(texts.shape[1]).flip(0)).sum(1)


def tiny(generator, vocabulary=4, **changes):
    """A decoder whose distribution over few tokens depends on all that came before."""
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 8} | changes
    return initialize_(Decoder(Config(vocabulary=vocabulary, **sizes)), generator, std=0.5)


def markov(table):
    """A decoder that continues token i by token j with chance `table[i, j]`: embeddings are unit vectors, layers add nothing."""
    size = len(table)
    config = Config(
        vocabulary=size, d_model=size, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2, norm_eps=1e-12
    )
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.layers[0].attention.o_proj.weight.zero_()
        model.layers[0].feed_forward.down_proj.weight.zero_()
        model.embedding.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table.log().T / size**0.5)
    return model
