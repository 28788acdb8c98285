"""Writing: against `generate`, against closed forms of short texts' chances, and what is kept and counted."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.distillation.sampling import continued, kept_tokens, written, written_mask
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_

CONFIG = Config(vocabulary=13, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)


@pytest.fixture
def decoder(generator):
    return initialize_(Decoder(CONFIG), generator, std=0.3)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_one_decoder_writes_as_generate_does(decoder, generator):
    """Oracle: `generate` at temperature 1; and the same model read from the start for each token."""
    prompts = torch.randint(0, 13, (5, 4), generator=generator)
    expected = generate(decoder, prompts, 6, temperature=1.0, generator=seeded())
    assert torch.equal(written([(1.0, decoder)], prompts, 6, seeded()), expected)
    assert torch.equal(written([(1.0, nn.Sequential(decoder))], prompts, 6, seeded()), expected)
    assert torch.equal(written([(0.4, decoder), (0.6, decoder)], prompts, 6, seeded()), expected)


def test_the_mixture_is_drawn_token_by_token(table):
    """Oracle: closed form: a text's chance is the product over tokens of 0.3 p + 0.7 q, and no mixture of products."""
    p, q = table(3, 2.0), table(3, 2.0)
    drawn = written([(0.3, p), (0.7, q)], torch.ones(40_000, 1, dtype=torch.int64), 2, seeded())
    seen = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / len(drawn)
    p, q = p.logits.softmax(-1), q.logits.softmax(-1)
    mixed = 0.3 * p + 0.7 * q
    expected = (mixed[1][:, None] * mixed).flatten()
    other = (0.3 * p[1][:, None] * p + 0.7 * q[1][:, None] * q).flatten()
    assert_close(seen.double(), expected.detach(), atol=0.01, rtol=0)  # four deviations of 40,000 draws
    assert (other - expected).abs().max() > 0.02  # negative control


def test_models_are_left_in_their_modes_and_without_gradients(decoder):
    """Oracle: their modes before; a dropout that is off while writing."""
    student = nn.Sequential(decoder, nn.Dropout(1.0)).train()
    decoder.eval()
    student[1].train()
    tokens = written([(1.0, student)], torch.ones(2, 3, dtype=torch.int64), 4, seeded())
    assert student.training and not tokens.requires_grad
    student[1] = nn.Identity()
    assert torch.equal(tokens, written([(1.0, student)], torch.ones(2, 3, dtype=torch.int64), 4, seeded()))


def test_what_is_kept_and_what_counts(decoder, generator):
    """Oracle: by hand: of 7 tokens 3 are kept, and targets 2 to 5, which are tokens 3 to 6, were written."""
    batch = torch.randint(0, 13, (3, 7), generator=generator)
    given = continued(batch, 0.5, [(1.0, decoder)], seeded())
    assert given.tokens.shape == batch.shape and torch.equal(given.tokens[:, :3], batch[:, :3])
    assert torch.equal(given.tokens[:, 3:], generate(decoder, batch[:, :3], 4, temperature=1.0, generator=seeded()))
    assert given.mask.tolist() == [[False, False, True, True, True, True]] * 3
    assert torch.equal(written_mask(batch, 0.5), given.mask)
    assert [kept_tokens(7, share) for share in (0.01, 0.3, 0.99)] == [1, 2, 6]


def test_a_row_too_short_is_refused(decoder):
    with pytest.raises(ValueError, match="rows of 1 tokens"):
        continued(torch.ones(2, 1, dtype=torch.int64), 0.5, [(1.0, decoder)], seeded())
