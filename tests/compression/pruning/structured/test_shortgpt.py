"""ShortGPT: cosines by hand, planted blocks, and models that still decode."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.blocks import keep_blocks
from refimpl.compression.protocol import compress
from refimpl.compression.pruning.structured.shortgpt import ShortGPT, block_influence, n_removed
from refimpl.compression.quantization.weight_only.gptq import GPTQ
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import perplexity, train, windows


def by_hand(model, block_list, batches):
    """Block Influence in float64, from the definition: every block is run on its own input, token by token."""
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((m, args, kwargs)), with_kwargs=True)
        for block in model.get_submodule(block_list)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    cosines = {block: [] for block in model.get_submodule(block_list)}
    for block, (x, *args), kwargs in calls:
        with torch.no_grad():
            y = block(x, *args, **kwargs)
        y = y if isinstance(y, torch.Tensor) else y[0]
        for a, b in zip(x.double().flatten(0, 1), y.double().flatten(0, 1), strict=True):
            cosines[block].append(float(a @ b / (a @ a * (b @ b)).sqrt()))
    return torch.tensor([1 - sum(values) / len(values) for values in cosines.values()], dtype=torch.float64)


def test_influence_is_one_minus_the_mean_cosine(build, block_list, tokens):
    """Oracle: Eq. (1), token by token in float64. Batches of different sizes: each token weighs the same."""
    model, batches = build(), [tokens, tokens[:1, :4]]
    found = block_influence(model, block_list, batches)
    assert_close(found, by_hand(model, block_list, batches), rtol=0, atol=1e-6)  # hidden states are float32
    assert found.min() > 0.01 and found.std() > 0.01  # negative control: blocks differ
    assert not any(block._forward_hooks for block in model.get_submodule(block_list))


def plant(model, block_list, place):
    """Make a block return its input."""
    for name, parameter in model.get_submodule(block_list)[place].named_parameters():
        if any(last in name for last in ("o_proj", "down_proj", "out_proj", "fc2", "c_proj")):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_block_that_does_nothing_goes_first(build, block_list, tokens, logits, place):
    """Oracle: closed form. Its influence is 0, and without it the model says what it said before."""
    model = plant(build(), block_list, place)
    assert_close(
        block_influence(model, block_list, [tokens])[place], torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-6
    )
    small = ShortGPT(sparsity=0.25)(model, [tokens])
    assert len(small.get_submodule(block_list)) == 3
    assert_close(logits(small, tokens), logits(model, tokens))
    smaller = ShortGPT(sparsity=0.5)(model, [tokens])
    assert not torch.allclose(logits(smaller, tokens), logits(model, tokens))  # negative control


def test_the_least_influential_go(build, block_list, tokens, logits):
    """Oracle: the definition. The two blocks of lowest influence are gone, the others are in order."""
    model = build()
    order = by_hand(model, block_list, [tokens]).argsort().tolist()
    expected = build()
    keep_blocks(expected, block_list, sorted(order[2:]))
    small = ShortGPT(sparsity=0.5)(model, [tokens])
    assert_close(logits(small, tokens), logits(expected, tokens))


def test_parameters_are_gone(build, block_list, tokens):
    """Oracle: the parameters of three blocks, counted."""
    model = build()
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.get_submodule(block_list)]
    small = ShortGPT(sparsity=0.75)(model, [tokens])
    count = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert count[0] - count[1] == 3 * sizes[0]
    assert len(set(sizes)) == 1


def test_nothing_removed_is_the_identity(build, tokens, logits):
    """Oracle: the model; data is not asked for."""
    model = build()
    small = ShortGPT(sparsity=0.0)(model)
    assert torch.equal(logits(small, tokens), logits(model, tokens))
    assert small is not model


@torch.no_grad()
def test_decoding_with_a_cache_equals_reading_at_once(build, architecture, tokens, logits):
    """Oracle: the shortened model without a cache, greedy, token by token. The cache has an entry for each block left."""
    small = ShortGPT(sparsity=0.5)(build(), [tokens])
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, logits(small, expected)[:, -1:].argmax(-1)], dim=1)
    if architecture == "decoder":
        cache = FullCache(small.config.sliding_window)
        assert torch.equal(generate(small, tokens, 5, cache=cache), expected[:, 11:])
        assert sorted(cache._layers) == [0, 1]
    else:
        output = small.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(output[:, 11:], expected[:, 11:]) or (output == 0).any()  # unless it ended
        assert len(small(tokens, use_cache=True).past_key_values) == 2


def test_a_shortened_decoder_is_saved_and_loaded(tokens, logits, tmp_path):
    """Oracle: the model before saving; a checkpoint of a shorter model is an ordinary one."""
    from refimpl.model.load import load, save
    from tests.compression.conftest import decoder

    small = ShortGPT(sparsity=0.25)(decoder(), [tokens])
    small.config = Config(
        **{**vars(small.config), "sliding_window": ()}
    )  # no checkpoint says a window for single layers
    for layer in small.layers:
        layer.attention.window = None
    save(small, tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens), logits(small, tokens))


def test_a_shortened_llama_is_saved_and_loaded(tokens, logits, tmp_path):
    """Oracle: the model before saving."""
    from transformers import LlamaForCausalLM

    from tests.compression.conftest import llama

    small = ShortGPT(sparsity=0.25)(llama(), [tokens])
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), tokens), logits(small, tokens))


def test_then_quantized(build, tokens, logits):
    """Oracle: the shortened model. The relation `composes_with`: ShortGPT first, then GPTQ."""
    small = ShortGPT(sparsity=0.25)(build(), [tokens])
    both = compress(small, GPTQ(bits=8, group_size=8), [tokens])
    off = (logits(both, tokens) - logits(small, tokens)).norm() / logits(small, tokens).norm()
    assert 0 < off < 0.1


def test_keyword_batches_and_half_precision(build, block_list, tokens):
    """Oracle: the float32 influences; batches as tokenizers give them."""
    if block_list == "layers":
        model, batch = build().bfloat16(), {"tokens": tokens}
    else:
        model, batch = build().bfloat16(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    found = block_influence(model, block_list, [batch])
    assert_close(found, block_influence(build(), block_list, [tokens]), rtol=0.1, atol=0.02)  # 8 bits of mantissa
    assert next(ShortGPT()(model, [batch]).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("blocks", "sparsity", "removed"),
    [
        (32, 9 / 32, 9),
        (40, 0.25, 10),
        (6, 0.25, 2),
        (6, 0.01, 1),
        (6, 0.99, 5),
        (1, 0.9, 0),
        (100, 0.29, 29),
        (6, 0.0, 0),
    ],
)
def test_number_of_blocks_by_hand(blocks, sparsity, removed):
    """Oracle: by hand. The nearest whole number, never nothing where something is asked for, never all."""
    assert n_removed(blocks, sparsity) == removed


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_configuration_is_checked(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity={sparsity} must be 0 \(no block is removed\) to below 1"):
        ShortGPT(sparsity=sparsity)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((), "needs texts .*: pass `calibration`"),
        (torch.ones(1, 2), "must be a list of batches"),
        ([torch.tensor([[61]])], "can't take calibration batch 0"),
        ([torch.full((1, 3, 32), float("nan"))], r"gives blocks \[0, 1, 2, 3\] NaN"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    from tests.compression.conftest import decoder

    with pytest.raises(ValueError, match=message):
        ShortGPT()(decoder(), calibration)


def test_models_without_blocks_are_refused():
    with pytest.raises(ValueError, match="the model has no blocks"):
        ShortGPT()(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])


def test_claim_llama_7b_ratio(claim):
    """Parameters of LLaMA-2 7B's shape without 9 of its 32 blocks, counted without storage."""
    shape = {"vocabulary": 32000, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "d_ff": 11008}
    with torch.device("meta"):
        model = Decoder(Config(n_layers=32, **shape))
    before = sum(p.numel() for p in model.parameters())
    keep_blocks(model, "layers", range(32 - n_removed(32, 9 / 32)))
    claim("shortgpt", "llama-7b-ratio", 100 * (1 - sum(p.numel() for p in model.parameters()) / before))


def test_claim_least_influence_costs_least(claim):
    """Perplexity without the least influential block over the median of those without another; a model trained for seconds."""
    generator = torch.Generator().manual_seed(0)
    table = (
        torch.randn(16, 16, 16, generator=generator).argmax(-1).tolist()
    )  # what follows two tokens, four times in five
    noise = torch.randint(0, 20, (4000,), generator=generator).tolist()
    text = [0, 0]
    for drawn in noise:
        text.append(drawn if drawn < 4 else table[text[-2]][text[-1]])
    tokens = torch.tensor(text)
    shape = {"vocabulary": 16, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(n_layers=6, **shape)), generator, std=0.1)
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), windows(tokens, 8, 32, generator), steps=120)
    influence = block_influence(model.eval(), "layers", [tokens[:1024].view(-1, 32)])
    without = []
    for place in range(6):
        small = copy.deepcopy(model)
        keep_blocks(small, "layers", [other for other in range(6) if other != place])
        without.append(perplexity(small, tokens, 32))
    least = without.pop(int(influence.argmin()))
    claim("shortgpt", "least-influence-costs-least", least / statistics.median(without))
