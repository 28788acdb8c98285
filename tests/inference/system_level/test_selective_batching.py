"""Selective batching: one pass over requests at different places. Oracle: the model's own pass over each alone."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.inference.system_level.selective_batching import read, separately
from refimpl.model.cache import FullCache
from refimpl.model.config import Config, Rope
from refimpl.model.model import Attention, Decoder, initialize_
from tests.inference.system_level.conftest import SIZES

TEXTS = [[5, 7, 33, 2, 60], [8], [3, 41, 5, 9, 9, 1, 4], [12, 13, 14]]
READ = [0, 0, 6, 1]  # of each, before the pass: two prompts, a last token, the rest of a prompt


def before(model):
    """Caches that hold what was read before."""
    caches = [FullCache() for _ in TEXTS]
    for text, done, cache in zip(TEXTS, READ, caches, strict=True):
        if done:
            model.hidden(torch.tensor([text[:done]]), cache)
    return caches


def together(model, starts=READ, order=(0, 1, 2, 3)):
    caches, new = before(model), [text[done:] for text, done in zip(TEXTS, READ, strict=True)]
    with torch.no_grad():
        hidden = read(model, new, starts, lambda whole: separately(whole, [caches[i] for i in order]))
    return hidden, caches


def apart(model):
    with torch.no_grad():
        return torch.cat([model.hidden(torch.tensor([text]))[:, -1] for text in TEXTS])


def test_each_request_is_read_as_it_is_alone(model):
    """Oracle: the whole forward of each request, in float64, with windows and without; caches hold all of the text.

    Negative controls: another request's cache, and positions that are off.
    """
    model = model.double()
    hidden, caches = together(model)
    assert_close(hidden, apart(model))
    assert [cache.length for cache in caches] == [len(text) for text in TEXTS]
    assert (together(model, order=(0, 1, 3, 2))[0] - apart(model)).abs().max() > 0.1
    assert (together(model, starts=[0, 0, 5, 1])[0] - apart(model)).abs().max() > 0.01


def test_positions_added_to_scores_and_frequencies_that_depend_on_the_length(generator):
    """Oracle: the same: distances of each request's own tokens (ALiBi's form), and dynamic frequencies beyond the context of 4."""
    config = Config(**SIZES, rope=Rope(type="dynamic", factor=2.0), max_positions=4)
    model = initialize_(Decoder(config), generator, std=0.3).double()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64).view(1, 4, 1, 1)
    model.score_bias = lambda queries, keys: -slopes * (queries - keys)
    texts = [TEXTS[0], TEXTS[1], TEXTS[2]]
    caches = [FullCache() for _ in texts]
    with torch.no_grad():
        hidden = read(model, texts, [0, 0, 0], lambda whole: separately(whole, caches))
        alone = torch.cat([model.hidden(torch.tensor([text]))[:, -1] for text in texts])
        model.score_bias = None
        assert (torch.cat([model.hidden(torch.tensor([text]))[:, -1] for text in texts]) - alone).abs().max() > 0.01
    assert_close(hidden, alone)


def test_linear_layers_see_all_tokens_as_one_matrix(plain):
    """Oracle: by hand: 5 + 1 + 1 + 2 tokens."""
    shapes = []
    plain.layers[1].feed_forward.up_proj.register_forward_pre_hook(
        lambda _, given: shapes.append(tuple(given[0].shape))
    )
    caches = before(plain)
    shapes.clear()
    read(
        plain,
        [text[done:] for text, done in zip(TEXTS, READ, strict=True)],
        READ,
        lambda whole: separately(whole, caches),
    )
    assert shapes == [(1, 9, 32)]


def test_foreign_attention_is_refused(plain):
    class Other(Attention):
        pass

    plain.layers[1].attention = Other(plain.config, 1)
    with pytest.raises(ValueError, match=r"layers\[1\].attention=Other can't be split"):
        read(plain, [[5]], [0], lambda whole: separately(whole, [FullCache()]))
