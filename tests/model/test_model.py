"""The decoder: logits of transformers for every supported kind; cache, chunks, padding and windows change nothing."""

import copy

import pytest
import torch
from torch.testing import assert_close

from refimpl.architecture.attention.kernel_low_rank.linear_attention import LinearAttention
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.load import load
from refimpl.model.model import Decoder, RMSNorm, attend, initialize_
from tests.model.conftest import KINDS

CONFIG = Config(vocabulary=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
WINDOWS = Config(**{**vars(CONFIG), "sliding_window": (None, 5, 3)})
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # fp32: logits are about 10, and sums run in another order


def decoder(generator, config=CONFIG):
    return initialize_(Decoder(config), generator, std=0.3).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(checkpoint, tokens, kind):
    """Peer: transformers 5.23.0, on a wide initialization, where attention is far from flat."""
    peer, folder = checkpoint(kind)
    model = load(folder)
    with torch.no_grad():
        expected = peer(tokens).logits
        assert_close(model(tokens), expected, **CLOSE)
        assert expected.std() > 1
        broken = copy.deepcopy(model)  # control: a small fault is seen
        broken.layers[0].attention.k_proj.weight[0] *= 1.1
        assert (broken(tokens) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama-dynamic", "llama-llama3", "llama-yarn", "mistral"])
def test_logits_beyond_the_trained_context(checkpoint, generator, kind):
    """Peer: transformers 5.23.0, at 100 tokens of a context of 64."""
    peer, folder = checkpoint(kind)
    tokens = torch.randint(0, 61, (1, 100), generator=generator)
    with torch.no_grad():
        assert_close(load(folder)(tokens), peer(tokens).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen3-mixed", "qwen2"])
def test_bfloat16_is_close_to_transformers(checkpoint, tokens, kind):
    """Peer: transformers 5.23.0 in bfloat16; both round, so it is float32 that tells how far either may be off."""
    peer, folder = checkpoint(kind, initializer_range=0.1)
    with torch.no_grad():
        exact = peer(tokens).logits
        theirs = (peer.bfloat16()(tokens).logits - exact).square().mean().sqrt()
        model = load(folder, dtype=torch.bfloat16)
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).square().mean().sqrt() < 1.2 * theirs


def test_gradients_equal_those_of_transformers(checkpoint, tokens):
    """Peer: transformers 5.23.0: the gradient of a loss, in every parameter."""
    peer, folder = checkpoint("qwen3-mixed")
    model = load(folder)
    for logits in (peer(tokens).logits, model(tokens)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    scale = max(parameter.grad.abs().max() for parameter in peer.parameters())
    theirs, ours = (sorted(p.grad.norm().item() for p in m.parameters()) for m in (peer, model))
    assert ours == pytest.approx(theirs, abs=1e-4 * scale.item())
    assert_close(model.embedding.weight.grad, peer.model.embed_tokens.weight.grad, atol=1e-4 * scale.item(), rtol=1e-3)


def test_the_other_layout_of_rope_would_be_seen(checkpoint, tokens, monkeypatch):
    """Negative control: rotation of neighbours, as in Meta's own files."""
    peer, folder = checkpoint()

    def neighbours(x, cos, sin):
        order = torch.arange(8).view(2, 4).t().reshape(-1)
        return x * cos[..., order] + x.unflatten(-1, (4, 2)).flip(-1).flatten(-2) * sin[..., order]

    with torch.no_grad():
        right = peer(tokens).logits
        monkeypatch.setattr("refimpl.model.model.rotate", neighbours)
        assert (load(folder)(tokens) - right).abs().max() > 1


@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("chunks", [[33], [1] * 33, [20, 13], [7, 1, 1, 9, 2, 13], [4, 29]])
@pytest.mark.parametrize("windowed_cache", [False, True])
def test_chunks_with_a_cache_equal_the_whole_without(generator, tokens, config, chunks, windowed_cache):
    """Oracle: the whole forward; the cache may drop what no window shows, or not."""
    model = decoder(generator, config)
    cache = FullCache(config.sliding_window if windowed_cache else ())
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(tokens), **CLOSE)
    assert cache.length == 33


@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("chunks", [[33], [6, 1, 1, 25], [1] * 33])
def test_a_padded_batch_equals_its_rows(generator, tokens, config, chunks):
    """Oracle: each row alone, without padding; what stands in the padding does not matter."""
    model, padding = decoder(generator, config), torch.tensor([0, 7, 32])
    cache = FullCache(config.sliding_window)
    logits = torch.cat([model(part, cache, padding) for part in tokens.split(chunks, dim=1)], dim=1)
    assert logits.isfinite().all()
    assert_close(model(tokens, padding=padding), logits, **CLOSE)
    for row, gap in enumerate(padding.tolist()):
        assert_close(logits[row, gap:], model(tokens[row : row + 1, gap:])[0], **CLOSE)
    assert not torch.allclose(logits[1], model(tokens)[1], atol=0.1)  # control: unmasked padding is seen


def test_padding_is_finite_with_any_attention_function(generator, tokens):
    """Oracle: a softmax written out, which a row that sees nothing would make NaN, and with it all that reads its value."""

    def written_out(q, k, v, *, mask):
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return (q @ k.mT / 8**0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    model, padding = decoder(generator), torch.tensor([0, 7, 32])
    before = model(tokens, padding=padding)
    for layer in model.layers:
        layer.attention.attend = lambda q, k, v, *, causal, mask: written_out(q, k, v, mask=mask)
    assert_close(model(tokens, padding=padding), before, **CLOSE)


def test_padded_batch_equals_transformers(checkpoint, tokens):
    """Peer: transformers 5.23.0, with its attention_mask and position_ids."""
    peer, folder = checkpoint("qwen2-mixed")
    padding = torch.tensor([0, 7, 20])
    mask = torch.arange(33) >= padding[:, None]
    with torch.no_grad():
        theirs = peer(tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert_close(load(folder)(tokens, padding=padding)[mask], theirs[mask], **CLOSE)


@pytest.mark.parametrize("config", [CONFIG, WINDOWS], ids=["full", "windows"])
def test_no_future_and_nothing_beyond_the_window_is_seen(generator, tokens, config):
    """Oracle: by hand: after a token changes, so do later logits, and none before; a window of 3 in 1 layer reaches 2 on."""
    model, other = decoder(generator, config), tokens.clone()
    other[:, 10] = (other[:, 10] + 1) % 61
    changed = (model(tokens) != model(other)).any(dim=-1).any(dim=0)
    assert not changed[:10].any()
    assert changed[10:].all()
    short = decoder(generator, Config(**{**vars(CONFIG), "n_layers": 1, "sliding_window": (3,)}))
    moved = (short(tokens) - short(other)).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [10, 11, 12]


def test_grouped_heads_equal_repeated_ones(generator):
    """Oracle: softmax written out, query head h on key head h // group; with masks by key head and by query head."""
    k, v = torch.randn(2, 3, 2, 9, 8, generator=generator)
    for time in (1, 4):
        q = torch.randn(3, 6, time, 8, generator=generator)
        for heads in (1, 2, 6):
            mask = torch.rand(3, heads, time, 9, generator=generator) > 0.4
            mask[..., 0] = True
            wide = mask.repeat_interleave(3, dim=1) if heads == 2 else mask
            scores = (q @ k.repeat_interleave(3, dim=1).mT / 8**0.5).masked_fill(~wide, float("-inf"))
            expected = scores.softmax(-1) @ v.repeat_interleave(3, dim=1)
            assert_close(attend(q, k, v, mask=mask), expected)


class Dropping(FullCache):
    """Keeps the first 2 and the last 4 tokens, and says which; a second form puts a gap beside them."""

    def __init__(self, gap=False):
        super().__init__()
        self.gap = gap

    def update(self, layer, k, v, queries, positions):
        k, v, _ = super().update(layer, k, v, queries, positions)
        n = k.shape[2]
        at = torch.tensor([i for i in range(n) if i < 2 or i >= n - 4])
        where = at.expand(len(k), 2, -1)
        if self.gap:
            at, where = torch.cat((at, at[:1])), torch.cat((where, -torch.ones_like(where[..., :1])), dim=-1)
        return k[:, :, at], v[:, :, at], where


@pytest.mark.parametrize("gap", [False, True])
def test_a_cache_that_drops_says_which_it_kept(generator, tokens, gap):
    """Oracle: the mask that hides the same tokens from a cache that keeps all, token by token."""
    model, cache, full = decoder(generator), Dropping(gap), FullCache()

    def hiding(q, k, v, *, causal=False, mask=None):
        n = torch.arange(k.shape[2])
        return attend(q, k, v, mask=((n < 2) | (n >= k.shape[2] - 4)).expand(1, 1, 1, -1))

    other = copy.deepcopy(model)
    for layer in other.layers:
        layer.attention.attend = hiding
    for token in tokens.split(1, dim=1):
        assert_close(model(token, cache), other(token, full), **CLOSE)


def test_an_attention_function_is_replaced_by_assignment(generator, tokens):
    """Oracle: one that computes the same; it gets no mask where `causal` says it all."""
    model, calls = decoder(generator), []
    before = model(tokens)

    def same(q, k, v, *, causal):
        calls.append(causal)
        return attend(q, k, v, causal=causal)

    for layer in model.layers:
        layer.attention.attend = same
    assert torch.equal(model(tokens), before)
    cache = FullCache()
    model(tokens, cache)
    model(tokens[:, :1], cache)
    assert calls == [True] * 6 + [False] * 3


def test_biased_scores(generator, tokens):
    """Oracle: ALiBi written out as a mask of floats; in chunks and padded as whole and alone."""
    model = decoder(generator)
    before, slopes = model(tokens), torch.tensor([1.0, 0.5, 0.25, 0.125]).view(1, 4, 1, 1)

    def alibi(q, k, v, *, causal):
        i = torch.arange(33)
        bias = slopes * (i - i[:, None]).float().masked_fill(i > i[:, None], float("-inf"))
        return attend(q, k, v, mask=bias)

    other = copy.deepcopy(model)
    for layer in other.layers:
        layer.attention.attend = alibi
    model.score_bias = lambda q, k: slopes * (k - q)
    biased = model(tokens)
    assert_close(biased, other(tokens), **CLOSE)
    assert (biased - before).abs().max() > 0.1
    cache = FullCache()
    parts = [model(part, cache) for part in tokens.split([11, 21, 1], dim=1)]
    assert_close(torch.cat(parts, dim=1), biased, **CLOSE)
    assert_close(model(tokens, padding=torch.tensor([0, 3, 9]))[1, 3:], model(tokens[1:2, 3:])[0], **CLOSE)


def test_positions_and_feed_forward_are_replaced_by_assignment(generator, tokens):
    """Oracle: one layer without positions can't tell the order of what came before; a layer of zeros adds nothing."""
    model = decoder(generator, Config(**{**vars(CONFIG), "n_layers": 1, "sliding_window": ()}))
    swapped = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=0.1)
    model.rotary = lambda positions, dtype: (torch.ones(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype))
    assert_close(model(tokens)[:, -1], model(swapped)[:, -1], **CLOSE)
    layer = model.layers[0]
    layer.feed_forward = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.zeros_(layer.feed_forward.weight)
    layer.attention.o_proj.weight.data.zero_()
    assert_close(model(tokens), model.logits(model.norm(model.embedding(tokens))))


def test_an_attention_method_of_the_survey_fits(generator, tokens):
    """Oracle: the method alone, on the layer's own queries and keys."""
    model, seen = decoder(generator), {}

    def spy(q, k, v, *, causal):
        seen["out"] = LinearAttention()(q, k, v, causal=causal)
        return seen["out"]

    model.layers[2].attention.attend = spy
    spied = model(tokens)
    model.layers[2].attention.attend = LinearAttention()
    assert torch.equal(model(tokens), spied)
    assert seen["out"].shape == (3, 4, 33, 8)


def test_positions_may_be_told(generator, tokens):
    """Oracle: positions that are counted, of padding and behind a cache. Control: others give other logits."""
    model, padding = decoder(generator), torch.tensor([0, 2, 5])
    counted = torch.arange(tokens.shape[1]) - padding[:, None]
    whole = model.hidden(tokens, None, padding)
    assert torch.equal(model.hidden(tokens, None, padding, counted), whole)
    cache = FullCache()
    model.hidden(tokens[:, :4], cache, padding)
    told = model.hidden(tokens[:, 4:], cache, padding, counted[:, 4:])
    assert_close(told[:, 1:], whole[:, 5:], **CLOSE)
    assert not torch.allclose(model.hidden(tokens, None, padding, 2 * counted), whole, atol=0.1)


def test_embeddings_stand_for_tokens(generator, tokens):
    """Oracle: the same tokens, embedded by hand."""
    model = decoder(generator)
    assert torch.equal(model(model.embedding(tokens)), model(tokens))


def test_rms_norm_rounds_before_the_product(generator):
    """Oracle: float64, and the order of casts of transformers' LlamaRMSNorm."""
    x, norm = torch.randn(3, 5, 8, generator=generator), RMSNorm(8, 1e-5)
    norm.weight.data = torch.randn(8, generator=generator)
    exact = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(norm(x).double(), exact.detach(), atol=1e-6, rtol=1e-5)
    low, norm = x.bfloat16(), norm.bfloat16()
    unit = low.float() * (low.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(low), norm.weight * unit.bfloat16())


def test_initialization_is_that_of_llama():
    """Oracle: the moments asked for; the same seed gives the same weights."""
    config = Config(**{**vars(CONFIG), "qkv_bias": True})
    model = initialize_(Decoder(config), torch.Generator().manual_seed(1), std=0.1)
    assert model.layers[0].attention.q_proj.bias.abs().max() == 0
    assert (model.norm.weight == 1).all()
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.1)
    twin = initialize_(Decoder(config), torch.Generator().manual_seed(1), std=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_shapes_are_checked(generator, tokens):
    model = decoder(generator)
    for wrong in (tokens[0], tokens[:, :0]):
        with pytest.raises(ValueError, match="tokens of shape"):
            model(wrong)
    with pytest.raises(ValueError, match=r"must be \[batch\], \[3\]"):
        model(tokens, padding=torch.tensor([1]))
