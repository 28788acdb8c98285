"""Self-information against the definition, text by text, and a reading that goes on from what was kept."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from torch.testing import assert_close

from refimpl.data.prompting.compression import self_information as module
from refimpl.data.prompting.compression.self_information import Reading, asked, beginning, self_information, surprise
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.testbed.tokenizer import tokenizer

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [], [3, 1, 4], [3, 1, 4], [7] * 5]


def by_definition(model, before, text):
    """-log softmax of the logits before each token, in float64, the whole read anew."""
    logits = model(torch.tensor([[*before, *text]]))[0].double()
    p = logits.softmax(-1)
    return torch.tensor([-math.log(p[len(before) + i - 1, token]) for i, token in enumerate(text)]).float()


@pytest.mark.parametrize("start", [[0], [8, 8, 2]])
@pytest.mark.parametrize("together", [4096, 12])
def test_every_text_alone_by_the_definition(tiny, start, together, monkeypatch):
    """Oracle: -log softmax in float64, one text at a time, no padding; texts of many lengths, equal ones, none, in small batches too."""
    monkeypatch.setattr(module, "TOGETHER", together)
    monkeypatch.setattr(module, "LOGITS", 3)
    found = self_information(tiny, TEXTS, start)
    for ours, text in zip(found, TEXTS, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (len(text),)
        assert_close(ours, by_definition(tiny, start, text), rtol=1e-4, atol=1e-4)  # float32 against float64
    assert not torch.allclose(
        found[0][:3], self_information(tiny, TEXTS, [1])[0][:3]
    )  # negative control: the start counts


def test_equal_texts_are_equal_to_the_bit(tiny):
    assert torch.equal(*self_information(tiny, TEXTS, [0])[3:5])


def test_nothing_before_a_text_is_chance():
    """Oracle: by hand: the first token has log(vocabulary), the others what they have after it."""
    config = Config(vocabulary=13, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.5).eval()
    alone, after = self_information(model, [[4, 2, 7]])[0], self_information(model, [[2, 7]], [4])[0]
    assert_close(alone, torch.cat((torch.tensor([math.log(13)]), after)))
    assert_close(Reading(model).judge(torch.tensor([4, 2, 7])), alone)
    assert self_information(model, [[4]])[0].tolist() == pytest.approx([math.log(13)])


def test_a_text_beyond_the_models_positions_is_read_in_pieces():
    """Oracle: the pieces as texts of their own."""
    config = Config(vocabulary=13, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8, max_positions=5)
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.5).eval()
    pieces = self_information(model, [[1, 2, 3, 4], [5, 6, 7, 8], [9]], [0])
    assert_close(self_information(model, [[1, 2, 3, 4, 5, 6, 7, 8, 9]], [0])[0], torch.cat(pieces))


@pytest.mark.parametrize("start", [[0], [8, 2], []])
def test_a_reading_by_the_definition(tiny, start):
    """Oracle: the model on start, what was kept, and the new part, read anew without a cache; a part of which nothing is kept, too."""
    reading, before = Reading(tiny, start), list(start)
    for part, keeps in ([3, 1, 4, 1], [0, 2]), ([5, 9], []), ([2], [0]), ([6, 5, 3], [1, 2]), ([5, 8], []):
        found = reading.judge(torch.tensor(part))
        known = by_definition(tiny, before, part) if before else None
        assert_close(
            found[not before :], (known if before else by_definition(tiny, part[:1], part[1:])), rtol=1e-4, atol=1e-4
        )
        kept = [part[i] for i in keeps]
        reading.keep(torch.tensor(kept, dtype=torch.int64))
        before += kept
    unkept = by_definition(tiny, [*start, 3, 1, 4, 1], [5, 9])
    assert not torch.allclose(unkept, by_definition(tiny, [*start, 3, 4], [5, 9]), atol=1e-2)  # negative control


def test_a_reading_reads_each_token_once_and_each_kept_one_twice(tiny, monkeypatch):
    """Oracle: counting the tokens that reach the model."""
    read, real = [], type(tiny).hidden
    monkeypatch.setattr(
        type(tiny), "hidden", lambda self, tokens, *a, **k: read.append(tokens.numel()) or real(self, tokens, *a, **k)
    )
    reading = Reading(tiny, [0])
    for part, kept in ([1, 2, 3, 4], [1, 2]), ([5, 6, 7], [5]), ([8, 9], [9]):
        reading.judge(torch.tensor(part))
        reading.keep(torch.tensor(kept))
    assert read == [1 + 4, 2 + 3, 1 + 2]
    assert reading.cache.length == 1 + 2 + 1  # what was kept last is not read yet


def test_half_precision_is_summed_in_float32(tiny):
    """Oracle: bfloat16 logits, then the definition in float32."""
    import copy

    half = copy.deepcopy(tiny).bfloat16()
    hidden, tokens = (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.tensor([1, 5, 2, 9]),
    )
    found = surprise(half, hidden, tokens)
    expected = -half.logits(hidden).float().log_softmax(-1)[range(4), tokens]
    assert found.dtype == torch.float32
    assert_close(found, expected)


def test_what_is_read_before_a_text():
    """Oracle: by hand: a tokenizer's own beginning, else a line break, else nothing."""
    letters = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="<s>"))
    letters.pre_tokenizer = None
    assert beginning(tokenizer()) == tokenizer().encode("\n").ids
    letters.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert beginning(letters) == [1]
    assert beginning(Tokenizer(models.BPE({"a": 0}, []))) == []


def test_the_model_is_needed_and_fits(tiny):
    assert asked(tiny, tokenizer(), "X") is tiny
    with pytest.raises(ValueError, match="X asks a causal model: pass one"):
        asked(None, tokenizer(), "X")
    small = Decoder(Config(vocabulary=61, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8))
    with pytest.raises(ValueError, match=r"model knows 61 tokens, the tokenizer 2048: pass"):
        asked(small, tokenizer(), "X")
