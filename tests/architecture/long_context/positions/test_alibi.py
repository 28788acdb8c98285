"""ALiBi: slopes by hand and by the official rule, the bias against a softmax written out, caches, grouped heads."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention, MptConfig, build_mpt_alibi_tensor

from refimpl.architecture.long_context.positions.alibi import ALiBi, LinearBias, alibi_mask, slopes
from refimpl.arena import positions as arena
from refimpl.arena.protocol import Conditions
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

CONFIG = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)


def written_out(q, k, v, m):
    """Section 3's softmax(q_i K + m [-(i - 1), ..., -1, 0]) for each query and head; query h reads key head h // group."""
    out, group = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), q.shape[1] // k.shape[1]
    past = k.shape[2] - q.shape[2]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        at = past + i
        scores = [
            float(q[b, h, i] @ k[b, h // group, j]) / math.sqrt(q.shape[3]) - m[h] * (at - j) for j in range(at + 1)
        ]
        weights = torch.tensor(scores, dtype=q.dtype).softmax(dim=0)
        out[b, h, i] = weights @ v[b, h // group, : at + 1]
    return out


def draw(generator, heads=4, kv_heads=2, time=7, kept=None, dtype=torch.float64):
    kept = kept or time
    shapes = [(2, heads, time, 8), (2, kv_heads, kept, 8), (2, kv_heads, kept, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_slopes_of_the_paper():
    """Oracle: Section 3, word by word: 1/2 to 1/256 for 8 heads; from 2^-0.5, by that ratio, for 16."""
    assert slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes(16).tolist() == pytest.approx([2 ** (-0.5 * h) for h in range(1, 17)])
    assert slopes(1).tolist() == [2**-8] and slopes(2).tolist() == [2**-4, 2**-8]


def test_slopes_of_twelve_heads():
    """Oracle: the official rule by hand: those of 8 heads, then the 1st, 3rd, 5th and 7th of the 16 of the next power."""
    expected = [2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert slopes(12).tolist() == pytest.approx(expected)
    assert slopes(12)[8:].tolist() != slopes(16)[:4].tolist()  # negative control: not the next power's first ones


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 12, 25, 32, 40, 71])
def test_slopes_equal_those_of_bloom_and_mpt(n):
    """Peers: transformers 5.23.0, two ways of the same rule; one position back tells the slope."""
    bloom = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1]
    assert_close(slopes(n), bloom)
    assert_close(slopes(n), -build_mpt_alibi_tensor(n, 2)[:, 0, 0])
    assert_close(slopes(n, 5.0), -build_mpt_alibi_tensor(n, 2, alibi_bias_max=5)[:, 0, 0])
    assert len(set(slopes(n).tolist())) == n and slopes(n).min() >= 2**-8 and slopes(n).max() < 1


def test_mask_worked_by_hand():
    """Oracle: the paper's Figure 3 for the first two of 8 heads, m = 1/2 and 1/4; a chunk of it is its last rows."""
    no = float("-inf")
    steps = torch.tensor([[0, no, no], [-1, 0, no], [-2, -1, 0]])
    mask = alibi_mask(8, 3, 3)
    assert mask.shape == (1, 8, 3, 3)
    assert torch.equal(mask[0, 0], steps / 2) and torch.equal(mask[0, 1], steps / 4)
    assert torch.equal(alibi_mask(8, 1, 3)[0, 0], steps[2:] / 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "time", "kept"), [(4, 2, 7, 7), (3, 1, 5, 9), (6, 6, 1, 4), (1, 1, 1, 1)]
)
def test_attention_written_out(heads, kv_heads, time, kept, generator):
    """Oracle: brute force in float64, pair by pair; grouped heads, and queries after a past."""
    q, k, v = draw(generator, heads, kv_heads, time, kept)
    mask = alibi_mask(heads, time, kept, q.dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)
    assert_close(out, written_out(q, k, v, slopes(heads).tolist()))
    if kept > 1:
        assert (out - written_out(q, k, v, slopes(heads).flip(0).tolist() if heads > 1 else [0.5])).abs().max() > 0.001


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # eager, as an oracle may be
def test_equals_flex_attention(generator):
    """Peer: torch's flex_attention, whose `score_mod` adds the bias to the scaled score."""
    q, k, v = draw(generator, kv_heads=4, time=33, dtype=torch.float32)
    m = slopes(4)

    def score_mod(score, b, h, i, j):
        return torch.where(i >= j, score - m[h] * (i - j), float("-inf"))

    theirs = flex_attention(q, k, v, score_mod=score_mod)
    assert_close(scaled_dot_product_attention(q, k, v, attn_mask=alibi_mask(4, 33, 33)), theirs)


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Peer: transformers 5.23.0, MPT's attention, with the bias that both build at each call and the same projections."""
    theirs = MptAttention(MptConfig(d_model=256, n_heads=8)).eval()
    x = torch.randn(2, 512, 256, generator=generator).requires_grad_()
    future = torch.ones(512, 512, dtype=torch.bool).triu(1)
    with torch.no_grad():
        for layer in (theirs.Wqkv, theirs.out_proj):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 16)

    def attend():
        q, k, v = theirs.Wqkv(x).view(2, 512, 3, 8, 32).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=alibi_mask(8, 512, 512))
        return theirs.out_proj(out.transpose(1, 2).flatten(2))

    def call(forward):
        if what == "forward":
            with torch.no_grad():
                return forward()
        out = forward()
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    peer(
        "alibi",
        "transformers",
        f"{what} of a layer's attention, 8 heads of 32, 2 texts of 512 tokens",
        lambda: call(attend),
        lambda: call(lambda: theirs(x, build_mpt_alibi_tensor(8, 512), attention_mask=future)[0]),
        within=1e-4,  # float32 rounding of sums over 512 keys; gradients of 30
    )


def test_equals_the_form_of_the_official_code(generator):
    """Oracle: the official code adds m * j to each row, which the softmax can't tell from -m * (i - j)."""
    q, k, v = draw(generator, kv_heads=4, time=33)
    future = torch.ones(33, 33, dtype=torch.bool).triu(1)
    theirs = (slopes(4).double().view(-1, 1, 1) * torch.arange(33)).expand(4, 33, 33).masked_fill(future, float("-inf"))
    ours = alibi_mask(4, 33, 33, torch.float64)
    assert_close(*(scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in (ours, theirs)))


def test_bias_by_the_positions_of_keys():
    """Oracle: by hand. A cache that dropped keys tells where those that it kept stand, in each key head others."""
    bias = LinearBias(torch.tensor([1.0, 0.5, 0.25, 0.125]))
    keys = torch.tensor([[0, 6], [3, -1]]).view(1, 2, 1, 2)
    out = bias(torch.tensor([7]).view(1, 1, 1, 1), keys)
    assert out.shape == (1, 4, 1, 2)
    assert out[0, :, 0].tolist() == [[-7, -1], [-3.5, -0.5], [-1, -2], [-0.5, -1]]


@torch.no_grad()
def test_installed_it_is_written_out_in_the_decoder(generator):
    """Oracle: brute force in the place of attention, on queries and keys that nobody turned."""
    model = ALiBi().install(initialize_(Decoder(CONFIG), generator, std=0.3).double())
    tokens, seen = torch.randint(0, 61, (2, 9), generator=generator), []
    expected = model(tokens)
    for layer in model.layers:
        projections = layer.attention

        def attend(q, k, v, *, causal, mask, p=projections):
            seen.append(q)
            return written_out(q, k, v, slopes(4).tolist())

        layer.attention.attend = attend
    assert_close(model(tokens), expected)
    x = model.layers[0].attention_norm(model.embedding(tokens))
    unturned = model.layers[0].attention.q_proj(x).view(2, 9, 4, 8).transpose(1, 2)
    assert_close(seen[0], unturned)


def test_attention_fades_with_distance():
    """Oracle: closed form; between equal scores the weight of a key is exp(-m) times that of the next."""
    v = torch.eye(33, dtype=torch.float64).view(1, 1, 33, 33).expand(1, 8, 33, 33)
    zero = torch.zeros(1, 8, 33, 4, dtype=torch.float64)
    weights = scaled_dot_product_attention(zero, zero, v, attn_mask=alibi_mask(8, 33, 33, torch.float64))[0, :, -1]
    assert_close(weights[:, 1:] / weights[:, :-1], slopes(8).double().exp().view(8, 1).expand(8, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_bias_once(dtype):
    """Oracle: float32. Distances up to 256 times a power of two are exact; in bfloat16 some beyond coincide."""
    exact, mask = alibi_mask(8, 600, 600), alibi_mask(8, 600, 600, dtype)
    assert mask.dtype == dtype
    near = torch.arange(600)[:, None] - torch.arange(600) <= 256
    assert torch.equal(mask.float()[:, :, near], exact[:, :, near])
    assert torch.equal(mask.float(), exact) == (dtype != torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ALiBi(max_exponent=0), "max_exponent=0 must be above 0; the paper's is 8"),
        (lambda: ALiBi(max_exponent=float("nan")), "max_exponent=nan must be above 0"),
        (lambda: slopes(0), "n_heads=0 must be at least 1"),
        (lambda: alibi_mask(4, 3, 2), "time=3 must be from 1 to kept=2"),
        (lambda: alibi_mask(4, 0, 2), "time=0 must be from 1 to kept=2"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_follows_the_positions_device(device):
    """Oracle: the same on the processor."""
    queries, keys = torch.arange(5).view(1, 1, 5, 1), torch.arange(5).view(1, 1, 1, 5)
    bias = ALiBi().score_bias(CONFIG)
    assert_close(bias(queries.to(device), keys.to(device)).cpu(), bias(queries, keys))


def test_the_most_of_a_score_that_slopes_take(generator):
    """Oracle: closed form; `max_exponent` names the flattest slope, and a larger one makes every slope flatter."""
    assert slopes(8, 4.0).tolist() == pytest.approx([2 ** (-h / 2) for h in range(1, 9)])
    assert slopes(8, 4.0).min() == 2**-4 and (slopes(8, 9.0) < slopes(8)).all()
    assert torch.equal(ALiBi(max_exponent=4.0).score_bias(CONFIG).slopes, slopes(4, 4.0))


def test_claims_of_extrapolation(claim, monkeypatch):
    """Losses beyond the trained length, of models that the arena `positions` trains in its quick form, faster: on a quarter of the texts."""
    monkeypatch.setattr(arena, "BATCH", 4)
    monkeypatch.setattr(arena, "RATE", 6e-3)  # makes up for it

    def losses(method, trained, *lengths):
        conditions = Conditions(generator=torch.Generator().manual_seed(0), quick=True)
        model = arena.trained(method, conditions, trained)
        return [arena.loss(model, arena.characters("held-out", 4097), length) for length in lengths]

    sinusoidal, alibi = losses(arena.Sinusoidal(), 64, 64, 256), losses(ALiBi(), 64, 64, 128, 256)
    (longer,) = losses(arena.Sinusoidal(), 128, 128)
    assert max(sinusoidal[0], alibi[0]) < 3.0  # both have learned: characters by their frequency alone leave 3.2
    claim("alibi", "extrapolates", alibi[2] - alibi[0])
    claim("alibi", "sinusoidal-fails", sinusoidal[1] - sinusoidal[0])
    claim("alibi", "matches-longer-training", alibi[1] - longer)
