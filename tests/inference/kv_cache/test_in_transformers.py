"""A cache of this family inside a model of transformers."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.in_transformers import InTransformers
from refimpl.inference.kv_cache.quantized.flexgen_kv import FlexGenKV
from refimpl.inference.kv_cache.quantized.gear import GEAR
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.inference.kv_cache.quantized.kvquant import KVQuant
from refimpl.model.cache import FullCache
from refimpl.model.generate import generate
from refimpl.model.load import load

SHAPE = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.3, "max_position_embeddings": 256,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
METHODS = [KIVI(residual_length=32), KIVI(bits=4, residual_length=32), FlexGenKV(), KVQuant()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random Llama of transformers, and the same weights here, in float64: rounding to few bits magnifies what differs (their angles are float32)."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().double()
    theirs.save_pretrained(folder)
    return theirs, load(folder)


def tokens(rows=2, time=70):
    return torch.randint(1, 61, (rows, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@torch.no_grad()
def test_their_model_says_with_it_what_ours_says(pair, method):
    """Oracle: our decoder with the same cache, whose logits without one equal theirs: the prompt, then token by token; and its bytes."""
    theirs, ours = pair
    past, own = InTransformers(method.cache(ours.config), 2), method.cache(ours.config)
    prompt, more = tokens(), tokens(time=5)
    assert_close(theirs(prompt, past_key_values=past).logits, ours(prompt, own), atol=1e-4, rtol=1e-4)
    own.compress_prefill()
    for token in more.split(1, dim=1):
        found, expected = theirs(token, past_key_values=past).logits, ours(token, own)
        assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (past.nbytes, past.get_seq_length()) == (own.nbytes, 75)
    full = FullCache()
    ours(prompt, full)
    exact = [ours(token, full) for token in more.split(1, dim=1)][-1]
    assert (found - exact).abs().max() > 1e-3  # negative control: it is compressed


@pytest.mark.parametrize("method", [*METHODS, GEAR()], ids=repr)
def test_it_gives_back_what_the_cache_gives_back(pair, method, generator):
    """Oracle: the cache itself, fed the same keys, in the two layers' turns: equal to the last bit."""
    config = pair[1].config
    past, own, seen = InTransformers(method.cache(config), 2), method.cache(config), 0
    for time in (70, 1, 1, 40):
        if time == 1 and seen == 70:
            own.compress_prefill()
        for layer in (0, 1):
            k, v = torch.randn(2, 2, 2, time, 32, generator=generator)
            expected = own.update(layer, k, v, k, torch.arange(seen, seen + time)[None])[:2]
            assert_close(past.update(k, v, layer), expected, atol=0, rtol=0)
        seen += time


def test_their_generate(pair):
    """Oracle: our `generate` with the same cache; and, where everything is in the residual, theirs with none of ours."""
    theirs, ours = pair
    prompt = tokens()
    options = {"max_new_tokens": 12, "do_sample": False}
    method = KIVI(bits=4, residual_length=32)
    past = InTransformers(method.cache(ours.config), 2)
    found = theirs.generate(prompt, past_key_values=past, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(found[:, 70:], generate(ours, prompt, 12, cache=method.cache(ours.config)))
    past = InTransformers(KIVI(residual_length=128).cache(ours.config), 2)
    found = theirs.generate(prompt, past_key_values=past, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(found, theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    past.reset()
    assert (past.nbytes, past.get_seq_length()) == (0, 0)
    again = theirs.generate(prompt, past_key_values=past, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(again, found)


@torch.no_grad()
def test_padded_rows_say_what_they_say_alone(pair):
    """Oracle: the row by itself, in their model."""
    theirs, ours = pair
    prompt, padding = tokens(), torch.tensor([0, 9])
    mask = (torch.arange(70)[None] >= padding[:, None]).long()
    made = KIVI(bits=4, residual_length=32)
    past = InTransformers(made.cache(ours.config), 2, padding)
    whole = theirs(prompt, past_key_values=past, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    step = torch.tensor([[5], [7]])
    mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
    after = theirs(step, past_key_values=past, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1).logits
    for row, pad in enumerate(padding.tolist()):
        alone = InTransformers(made.cache(ours.config), 2)
        assert_close(
            whole.logits[row, pad:],
            theirs(prompt[row : row + 1, pad:], past_key_values=alone).logits[0],
            atol=1e-4,
            rtol=1e-4,
        )
        assert_close(after[row], theirs(step[row : row + 1], past_key_values=alone).logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_prompt_is_over_when_a_single_token_follows_it(pair):
    """Oracle: by hand: however long the prompt is, and once."""
    told = []

    class Notes(FullCache):
        def compress_prefill(self):
            told.append(self.length)

    for prompt in (1, 5):
        told.clear()
        past = InTransformers(Notes(), 2)
        for time in (prompt, 1, 1):
            pair[0](tokens(time=time), past_key_values=past)
        assert told == [prompt]


@torch.no_grad()
def test_a_sliding_window_of_theirs(tmp_path):
    """Oracle: their own cache, when everything is in the residual."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)).eval()
    model.save_pretrained(tmp_path)
    past = InTransformers(KIVI(residual_length=128).cache(load(tmp_path).config), 2)
    prompt, step = tokens(), torch.tensor([[5], [7]])
    theirs = model(prompt, use_cache=True)
    assert_close(model(prompt, past_key_values=past).logits, theirs.logits, atol=1e-5, rtol=1e-5)
    expected = model(step, past_key_values=theirs.past_key_values).logits
    assert_close(model(step, past_key_values=past).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_their_models_cannot_be_told_is_refused(pair):
    theirs, ours = pair
    past = InTransformers(StreamingLLM(budget=16).cache(ours.config), 2)
    with torch.no_grad(), pytest.raises(ValueError, match=r"LayeredCache gives back .* tokens at places of its own"):
        theirs(tokens(), past_key_values=past)
        theirs(tokens(time=1), past_key_values=past)
    with pytest.raises(NotImplementedError, match="can't reorder its rows for beams"):
        past.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match="can't go back"):
        past.crop(-1)
