"""StreamingLLM: the official loop written out, a forward over the kept tokens, ten thousand tokens, claims."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.model.cache import FullCache
from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder, attend
from refimpl.model.rope import rotate
from tests.inference.kv_cache.decoders import decoder, feed, run, shape

TOKENS = torch.randint(0, 61, (2, 130), generator=torch.Generator().manual_seed(1))
ANGLES = {"rtol": 1e-4, "atol": 1e-4}  # angles up to 130 in float32, at other positions of equal distance


def unseen(keys, queries, window):
    """Which keys a query does not see, by their places."""
    return (keys > queries) | (queries - keys >= (window or math.inf))


def official(model, tokens, sizes, budget, sinks):
    """The official loop: keys are held unrotated, rotated at each call to their place in the cache, cut after the call."""
    past = [None] * len(model.layers)
    logits = []
    for chunk in tokens.split(sizes, dim=1):
        x = model.embedding(chunk)
        for i, layer in enumerate(model.layers):
            a, y = layer.attention, layer.attention_norm(x)
            q, k, v = (p(y).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            if past[i] is not None:
                k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
            n, time = k.shape[2], chunk.shape[1]
            window = slice(n - (budget - sinks), n)
            past[i] = (
                (k, v) if n <= budget else tuple(torch.cat([z[:, :, :sinks], z[:, :, window]], dim=2) for z in (k, v))
            )
            places = torch.arange(n)[None]
            k = rotate(k, *model.rotary(places, k.dtype)).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            q = rotate(q, *model.rotary(places[:, n - time :], q.dtype))
            scores = (q @ k.mT / math.sqrt(a.head_dim)).masked_fill(
                unseen(places[0], places[0, n - time :, None], model.config.sliding_window[i]), float("-inf")
            )
            x = x + a.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
        logits.append(model.logits(model.norm(x)))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("budget", "sinks"), [(12, 4), (12, 0), (9, 1), (70, 4), (5, 4)])
@pytest.mark.parametrize("sizes", [[1] * 130, [50] + [1] * 80, [7, 5, 1, 1, 30, 2, 50, 20, 14]])
def test_equals_the_official_loop(budget, sinks, sizes):
    """Oracle: the official code's way, written out: keys cached unrotated, positions 0 to n - 1 at every step."""
    model = decoder()
    cache = StreamingLLM(budget=budget, sinks=sinks).cache(model.config)
    expected = official(model, TOKENS, sizes, budget, sinks)
    assert_close(run(model, TOKENS, cache, sizes), expected, **ANGLES)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("type", ["linear", "llama3", "yarn"])
def test_scaled_rotations(type):
    """Oracle: as above, with frequencies, and for YaRN lengths, that are not the plain ones."""
    rope = Rope(theta=500.0, type=type, factor=4.0, original_max_positions=32)
    model = decoder(rope=rope)
    sizes = [40] + [1] * 90
    cache = StreamingLLM(budget=12).cache(model.config)
    assert_close(run(model, TOKENS, cache, sizes), official(model, TOKENS, sizes, 12, 4), **ANGLES)


@pytest.mark.parametrize("windows", [(6, None), (11, 3)])
@pytest.mark.parametrize("sizes", [[50] + [1] * 80, [7, 5, 1, 1, 30, 2, 50, 20, 14]])
def test_a_sliding_window_layer_sees_what_of_the_cache_lies_in_its_window(windows, sizes):
    """Oracle: the official loop, windows counted by places in the cache; one of 11 reaches back to the last sinks."""
    model = decoder(sliding_window=windows)
    expected = official(model, TOKENS, sizes, 12, 4)
    assert_close(run(model, TOKENS, StreamingLLM(budget=12).cache(model.config), sizes), expected, **ANGLES)
    assert (expected - official(decoder(), TOKENS, sizes, 12, 4)).abs().max() > 0.1  # negative control


def test_one_layer_is_a_forward_over_what_is_kept():
    """Oracle: a plain forward over first and last tokens side by side, which is exact where keys depend on their own token."""
    model = decoder(n_layers=1)
    for sinks in (0, 4):
        found = run(model, TOKENS, StreamingLLM(budget=20, sinks=sinks).cache(model.config), 1)
        for t in (25, 77, 129):
            kept = torch.cat([TOKENS[:, :sinks], TOKENS[:, t - 20 + sinks : t + 1]], dim=1)
            assert_close(found[:, t], model(kept)[:, -1], **ANGLES)


def test_two_layers_are_not_recomputation():
    """Oracle: the paper's other baseline, the window computed anew at each step: deeper keys of the cache remember what has left."""
    model = decoder()
    found = run(model, TOKENS, StreamingLLM(budget=20, sinks=0).cache(model.config), 1)
    assert not torch.allclose(found[:, 129], model(TOKENS[:, 109:])[:, -1], rtol=0.01, atol=0.01)


def test_positions_of_the_papers_figure():
    """Oracle: Section 3.2's example of Figure 4: of tokens 0 to 8 the cache holds 0 to 3 and 6 to 8, and token 9 comes at 7."""
    config = shape(n_heads=1, n_kv_heads=1, head_dim=2)
    v = torch.arange(10.0).view(1, 1, 10, 1).expand(1, 1, 10, 2)
    raw = torch.tensor([1.0, 0.0]).expand(1, 1, 10, 2)
    cache = StreamingLLM(budget=7).cache(config)
    *_, (k, values, positions) = feed(cache, config, raw, v, [1] * 10)
    assert values[0, 0, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    angle = torch.atan2(k[0, 0, :, 1], k[0, 0, :, 0])
    turns = (angle[-1] - angle) % (2 * math.pi)
    assert_close(turns, torch.tensor([7.0 - 2 * math.pi, 6, 5, 4, 3, 2, 1, 0]), rtol=0, atol=1e-5)
    assert positions is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_tokens(dtype):
    """Oracle: a forward over what is kept, in float64; positions stay below two budgets and bytes where they were."""
    model, exact = decoder(dtype, n_layers=1, head_dim=8), decoder(n_layers=1, head_dim=8)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 61, (1, 10_000), generator=torch.Generator().manual_seed(2))
    cache, sizes = StreamingLLM(budget=64).cache(model.config), []
    for chunk in tokens.split(20, dim=1):
        assert cache.length < 128
        logits = model(chunk, cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes[25:])) == 1
    assert sizes[-1] < 1.2 * 64 * 2 * 2 * 8 * dtype.itemsize
    kept = torch.cat([tokens[:, :4], tokens[:, 9_980 - 60 :]], dim=1)
    expected = exact(kept)[:, -20:]
    bound = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05 * float(expected.std())}
    )
    assert_close(logits.double(), expected, **bound)


def test_memory_of_a_prompt_is_freed():
    """Oracle: by hand: room for 16 + 1 tokens, and 4 sinks."""
    config = shape(n_kv_heads=1, n_heads=1)
    x = torch.zeros(1, 1, 5000, 32)
    cache = StreamingLLM(budget=16).cache(config)
    cache.update(0, x, x, x, torch.arange(5000)[None])
    assert cache.nbytes - config.head_dim // 2 * 4 == (16 + 1 + 4) * 32 * 2 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 4}, "budget=4 must be above sinks=4"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"budget": 0, "sinks": 0}, "budget=0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**change)


def test_dynamic_frequencies_are_refused():
    with pytest.raises(ValueError, match="rope type='dynamic'"):
        StreamingLLM().cache(shape(rope=Rope(type="dynamic", factor=2.0)))


# Claims


def with_sink(cycle=11):
    """A decoder that counts from 1 to `cycle` and again, and whose attention must rest on token 0, the first, or it spoils the count.

    One layer, written by hand. The residual holds the token, one-hot; the output layer reads the next token from it. Every query
    looks for token 0, whose value is 0; every other value raises the logit of a wrong token. The pair of channels that
    query and key use turns by 1e-4 a token.
    """
    config = Config(
        vocabulary=cycle + 2,
        d_model=cycle + 3,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=4,
        d_ff=1,
        rope=Rope(theta=1e8),
    )
    model = Decoder(config).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    width, wrong = config.d_model, cycle + 1
    model.embedding.weight[:, : cycle + 2] = torch.eye(cycle + 2)
    model.lm_head.weight[:, : cycle + 2] = 3 * torch.eye(cycle + 2).roll(1, 0)  # token t - 1 speaks for t
    model.lm_head.weight[1, cycle] = 3  # and the last for the first
    model.lm_head.weight[wrong, width - 1] = 6
    layer = model.layers[0]
    for norm in (layer.attention_norm, layer.feed_forward_norm, model.norm):
        norm.weight.fill_(1)
    layer.attention.q_proj.weight[1, : cycle + 2] = 1.5
    layer.attention.k_proj.weight[1, 0] = 1.5
    layer.attention.v_proj.weight[0, 1 : cycle + 2] = 1
    layer.attention.o_proj.weight[width - 1, 0] = 1
    return model, torch.cat([torch.zeros(1, 1, dtype=torch.int64), torch.arange(400)[None] % cycle + 1], dim=1)


def losses(model, tokens, cache):
    """Of each next token, read one by one."""
    logits = run(model, tokens[:, :-1], cache, 1)
    return cross_entropy(logits[0], tokens[0, 1:], reduction="none")


def test_the_window_collapses_at_the_very_step():
    """Oracle: the paper's Figure 3: nothing happens until the first token leaves, everything at the next."""
    model, tokens = with_sink()
    found = losses(model, tokens, StreamingLLM(budget=60, sinks=0).cache(model.config))
    dense = losses(model, tokens, FullCache())
    assert_close(found[:61], dense[:61])  # token 60 still sees 60 before it and itself
    assert found[61] > dense[61] + 3


def test_claim_window_collapses(claim):
    model, tokens = with_sink()
    window, dense = (
        losses(model, tokens, cache).mean()
        for cache in (StreamingLLM(budget=60, sinks=0).cache(model.config), FullCache())
    )
    claim("streaming-llm", "window-collapses", float((window - dense).exp()))


def test_claim_sinks_restore(claim):
    model, tokens = with_sink()
    kept, dense = (
        losses(model, tokens, cache).mean() for cache in (StreamingLLM(budget=60).cache(model.config), FullCache())
    )
    claim("streaming-llm", "sinks-restore", float((kept - dense).exp()))


@torch.no_grad()
def test_claim_collapses_when_trained(claim):
    """In calls of 16 tokens; and what its reason says is measured: how much of the attention the first four tokens get."""
    model = testbed.load()[0]
    tokens = torch.as_tensor(testbed.corpus.tokens("held-out")[:961]).long()[None]

    def nats(cache):
        hidden = torch.cat([model.hidden(part, cache) for part in tokens[:, :960].split(16, dim=1)], dim=1)
        return cross_entropy(model.logits(hidden[0, 256:]), tokens[0, 257:])

    window, dense = nats(StreamingLLM(budget=64, sinks=0).cache(model.config)), nats(FullCache())
    claim("streaming-llm", "collapses-when-trained", float((window - dense).exp()))
    shares = []

    def watched(q, k, v, *, causal=False, mask=None):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(q.shape[3])
        weights = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -math.inf).softmax(dim=3)
        shares.append(weights[0, :, 256:, :4].sum(dim=2).mean())
        return attend(q, k, v, causal=causal, mask=mask)

    for layer in model.layers:
        layer.attention.attend = watched
    model(tokens[:, :960])
    assert len(shares) == len(model.layers)
    assert_close(torch.stack(shares).mean(), torch.tensor(0.0007), rtol=0, atol=1e-4)


def test_claim_constant_memory(claim):
    """A layer that reads 990 tokens in one call, then single ones and chunks up to 10,000."""
    config = shape(n_kv_heads=1, n_heads=1)
    cache, x = StreamingLLM(budget=128).cache(config), torch.zeros(1, 1, 10_000, 32)
    held = {}
    for _ in feed(cache, config, x, x, [990] + [1] * 210 + [100] * 88):
        held[cache._seen[0]] = cache.nbytes
    claim("streaming-llm", "constant-memory", held[10_000] / held[1_000])
