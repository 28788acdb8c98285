"""RoPE: complex numbers, the theorem of relative positions, both layouts, the weights between them, the decay."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from refimpl.architecture.long_context.positions.protocol import NoPositions
from refimpl.architecture.long_context.positions.rope import (
    RoPE,
    decay_bound,
    frequencies,
    half_split_to_interleaved,
    interleaved_to_half_split,
    rope,
    rotate_neighbours,
)
from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import inverse_frequencies, rotate

CONFIG = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
LAYOUTS = ["half-split", "interleaved"]


def draw(generator, time=7, dim=8, heads=3, batch=2, dtype=torch.float64):
    return torch.randn(batch, heads, time, dim, generator=generator, dtype=torch.float64).to(dtype)


def turned(x, positions, layout, base=10000.0):
    """Eq. (12) by complex numbers, in float64."""
    half = x.shape[-1] // 2
    z = (
        torch.complex(x[..., 0::2], x[..., 1::2])
        if layout == "interleaved"
        else torch.complex(x[..., :half], x[..., half:])
    )
    theta = torch.tensor([base ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * theta
    angles = angles if angles.ndim == 2 else angles.unsqueeze(1)
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(z).flatten(-2) if layout == "interleaved" else torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "positions", [torch.arange(7), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 33, 2, 7, 5000, 1, 1]])]
)
def test_a_turn_is_a_complex_product(layout, positions, generator):
    """Oracle: Eq. (12), complex numbers in float64; the other layout, and the other direction, are other functions."""
    x = draw(generator)
    out = rope(x, positions, layout=layout)
    assert_close(out, turned(x, positions, layout))
    for other in (turned(x, positions, LAYOUTS[layout == LAYOUTS[0]]), turned(x, -positions, layout)):
        assert (out - other).abs().max() > 0.1


def test_worked_by_hand():
    """Oracle: by hand. Base 1e4 and dim 4: pair 0 turns by 1, pair 1 by 0.01; position 3."""
    x = torch.tensor([2.0, 0.0, 0.0, 5.0], dtype=torch.float64).view(1, 1, 1, 4)
    c, s = [math.cos(3), math.cos(0.03)], [math.sin(3), math.sin(0.03)]
    at = torch.tensor([3])
    assert_close(rope(x, at)[0, 0, 0].tolist(), [2 * c[0], -5 * s[1], 2 * s[0], 5 * c[1]])  # pairs (2, 0), (0, 5)
    assert_close(rope(x, at, layout="interleaved")[0, 0, 0].tolist(), [2 * c[0], 2 * s[0], -5 * s[1], 5 * c[1]])
    assert frequencies(6, 8.0, torch.float64).tolist() == pytest.approx([1, 0.5, 0.25])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_position_and_lengths_stay(layout, generator):
    """Oracle: theorem, rotations keep norms, and a rotation by 0 is the identity."""
    x = draw(generator)
    out = rope(x, torch.arange(7) * 1000, layout=layout)
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert (out[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turns_add_up(layout, generator):
    """Oracle: theorem, R_m R_n = R_{m+n}; so a cached key can be moved on, and back."""
    x = draw(generator)
    m, n = torch.arange(7), torch.arange(7).flip(0) * 50
    assert_close(rope(rope(x, m, layout=layout), n, layout=layout), rope(x, m + n, layout=layout))
    assert_close(rope(rope(x, m, layout=layout), -m, layout=layout), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_equal_the_whole(layout, generator):
    """Oracle: the whole; a chunk after a past begins at the past's length."""
    x = draw(generator)
    whole = rope(x, torch.arange(7), layout=layout)
    assert torch.equal(rope(x[:, :, 3:], torch.arange(3, 7), layout=layout), whole[:, :, 3:])


def test_claim_relative(claim, generator):
    """Largest change of a score of unit vectors when both positions move by the same, up to 100,000, in float64."""
    q, k = (torch.nn.functional.normalize(draw(generator, time=33, dim=64), dim=-1) for _ in range(2))
    m, n = torch.randint(0, 4096, (2, 33), generator=generator)
    moved = 0.0
    for layout in LAYOUTS:
        scores = (rope(q, m, layout=layout) * rope(k, n, layout=layout)).sum(-1)
        for by in (1, 1000, 100_000):
            after = (rope(q, m + by, layout=layout) * rope(k, n + by, layout=layout)).sum(-1)
            moved = max(moved, float((after - scores).abs().max()))
        one_only = (rope(q, m + 1, layout=layout) * rope(k, n, layout=layout)).sum(-1)
        assert (one_only - scores).abs().max() > 0.01  # negative control: the distance matters
    claim("rope", "relative", moved)


def test_the_interleaved_layout_is_gpt_js(generator):
    """Peer: transformers 5.23.0, GPT-J's `apply_rotary_pos_emb`, in float64, `[batch, time, heads, dim]`."""
    x, angles = draw(generator), torch.arange(7.0, dtype=torch.float64)[:, None] * frequencies(8, dtype=torch.float64)
    theirs = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), angles.sin()[None], angles.cos()[None])
    assert_close(rope(x, torch.arange(7), layout="interleaved"), theirs.transpose(1, 2))
    assert_close(rotate_neighbours(x, angles.cos()[None, None], angles.sin()[None, None]), theirs.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_half_split_layout_is_llamas(dtype, generator):
    """Peer: transformers 5.23.0, Llama's `apply_rotary_pos_emb`, on cosines and sines that are rounded as ours are."""
    q, k = draw(generator, dtype=dtype), draw(generator, heads=1, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    angles = (torch.arange(7)[:, None] * frequencies(8, dtype=wide)).repeat(1, 2)[None]
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, angles.cos().to(dtype), angles.sin().to(dtype))
    ours = rope(q, torch.arange(7)), rope(k, torch.arange(7))
    # In bfloat16 they round both products, ours the sum alone: half an ulp each of numbers up to 4.
    more = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 0.016} if dtype == torch.bfloat16 else {}
    assert_close(ours, theirs, **more)


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_transformers(what, peer, generator):
    """Peer: transformers 5.23.0, Llama's rotation, cosines and sines included, of queries and of fewer keys."""
    sizes = {"d_model": 1024, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "head_dim": 128, "d_ff": 8}
    rotary = RoPE().rotary(Config(vocabulary=8, **sizes))
    theirs = modeling_llama.LlamaRotaryEmbedding(
        modeling_llama.LlamaConfig(hidden_size=1024, num_attention_heads=8, max_position_embeddings=2048)
    )
    q, k = (torch.randn(1, heads, 2048, 128, generator=generator).requires_grad_() for heads in (8, 2))
    weights = [torch.randn(x.shape, generator=generator) for x in (q, k)]
    at = torch.arange(2048)[None]

    def turned_by_ours():
        cos, sin = rotary(at, q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def call(turn):
        if what == "forward":
            with torch.no_grad():
                return turn()
        out = turn()
        return *(x.detach() for x in out), *torch.autograd.grad(out, (q, k), weights)

    peer(
        "rope",
        "transformers",
        f"{what} of 8 heads of queries and 2 of keys, 2,048 tokens of 128",
        lambda: call(turned_by_ours),
        lambda: call(lambda: modeling_llama.apply_rotary_pos_emb(q, k, *theirs(q, at))),
        within=2e-3,  # frequencies that differ by an ulp, times 2,048 positions, times values of 5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_angles_are_float32_in_half_precision(dtype, layout, generator):
    """Oracle: complex numbers in float64, at positions where an angle in bfloat16 would be off by radians."""
    x = draw(generator, time=5, dtype=dtype)
    at = torch.tensor([0, 257, 1000, 4095, 30000])
    out = rope(x, at, layout=layout)
    assert out.dtype == dtype
    # Rounding of cosine, sine, two products and a sum of numbers up to 4; angles of 3e4 are exact to 2e-3 in float32.
    assert (out.double() - turned(x.double(), at, layout)).abs().max() < 4 * 4 * torch.finfo(dtype).eps + 2e-3 * 4


def test_frequencies_are_the_substrates():
    """Oracle: the checkpoint loader's frequencies, which are held against transformers; and by hand, 1 down to 1 / base."""
    for base, dim in ((10000.0, 8), (500000.0, 128), (100.0, 2)):
        assert torch.equal(frequencies(dim, base), inverse_frequencies(Rope(theta=base), dim, 2048))
    assert frequencies(64)[0] == 1 and frequencies(64)[-1] == pytest.approx(10000 ** -(62 / 64))


@torch.no_grad()
def test_installed_it_is_what_the_decoder_came_with(generator):
    """Oracle: the decoder of the same base, held against transformers; another base is another model."""
    tokens = torch.randint(0, 61, (2, 33), generator=generator)
    model = initialize_(Decoder(Config(**{**vars(CONFIG), "rope": Rope(theta=500.0)})), generator, std=0.3)
    expected = model(tokens)
    assert torch.equal(RoPE(base=500.0).install(NoPositions().install(model))(tokens), expected)
    assert (RoPE().install(model)(tokens) - expected).abs().max() > 0.1


def test_permuted_weights_give_the_same_scores(generator):
    """Oracle: the other layout's scores, of projections with grouped heads and biases; `peers.md`'s index by hand."""
    x = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    wq, wk = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (24, 8))
    bq, bk = (torch.randn(rows, generator=generator, dtype=torch.float64) for rows in (24, 8))

    def scores(wq, bq, wk, bk, layout):
        q, k = (torch.nn.functional.linear(x, *p).view(2, 7, -1, 8).transpose(1, 2) for p in ((wq, bq), (wk, bk)))
        return rope(q, torch.arange(7), layout=layout) @ rope(k, torch.arange(7), layout=layout).mT

    theirs = scores(wq, bq, wk, bk, "interleaved")
    moved = [interleaved_to_half_split(p, 8) for p in (wq, bq, wk, bk)]
    assert_close(scores(*moved, "half-split"), theirs)
    assert not torch.allclose(scores(wq, bq, wk, bk, "half-split"), theirs, atol=0.1)
    assert all(torch.equal(half_split_to_interleaved(p, 8), q) for p, q in zip(moved, (wq, bq, wk, bk), strict=True))
    assert interleaved_to_half_split(torch.arange(16), 8).tolist() == [
        0,
        2,
        4,
        6,
        1,
        3,
        5,
        7,
        8,
        10,
        12,
        14,
        9,
        11,
        13,
        15,
    ]


def test_the_bound_holds_and_by_hand(generator):
    """Oracle: Eq. (37) on random queries and keys; by hand at distance 0, and for one pair, whose sum has length 1."""
    q, k, d = draw(generator, time=200, dim=16), draw(generator, time=200, dim=16), torch.arange(200)
    h = torch.complex(q[..., 0::2], q[..., 1::2]) * torch.complex(k[..., 0::2], k[..., 1::2]).conj()
    steps = torch.cat((h[..., 1:], torch.zeros_like(h[..., :1])), dim=-1) - h
    bound = steps.abs().amax(dim=-1) * decay_bound(d, 16) * 8  # 8 = d / 2 sums, of which decay_bound is the mean
    scores = (rope(q, d, layout="interleaved") * k).sum(-1).abs()
    assert (scores <= bound).all() and (scores > 0.2 * bound).any()  # true, and not because it is far off
    assert decay_bound(torch.tensor([0]), 8).item() == (1 + 2 + 3 + 4) / 4
    assert_close(decay_bound(torch.arange(9), 2), torch.ones(9, dtype=torch.float64))


def test_claim_bound_decays(claim):
    """Mean of the bound over distances 192 to 256 over that at 0 to 64, at dim 128; the paper's Figure 2 names none."""
    at = decay_bound(torch.arange(257), 128)
    claim("rope", "bound-decays", float(at[192:].mean() / at[:65].mean()))


def test_claim_score_decays(claim, generator):
    """Root mean square of the score of a random query and a random key at distances of 200 to 256 over that at 0 to 56."""
    q, k = draw(generator, time=2000, dim=128), draw(generator, time=2000, dim=128)

    def size(low):
        distance = low + torch.arange(2000) % 57
        return (rope(q, distance) * k).sum(-1).square().mean().sqrt()

    claim("rope", "score-decays", float(size(200) / size(0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoPE(base=1.0), r"base=1.0 must be above 1; the paper's is 10000"),
        (lambda: RoPE(base=float("nan")), "base=nan must be above 1"),
        (lambda: frequencies(7), "dim=7 must be even and at least 2"),
        (lambda: frequencies(0), "dim=0 must be even and at least 2"),
        (lambda: frequencies(4, 0.5), r"base=0.5 must be above 1"),
        (lambda: rope(torch.ones(1, 1, 3, 5), torch.arange(3)), "dim=5 must be even"),
        (lambda: rope(torch.ones(1, 3, 4), torch.arange(3)), r"x of shape \(1, 3, 4\) must be"),
        (lambda: rope(torch.ones(1, 1, 3, 4), torch.arange(2)), r"positions of \(2,\)"),
        (lambda: rope(torch.ones(1, 1, 3, 4), torch.arange(3), layout="pairs"), "layout='pairs' must be"),
        (
            lambda: interleaved_to_half_split(torch.ones(6, 2), 4),
            r"weight of shape \(6, 2\) must have a multiple of head_dim=4",
        ),
        (lambda: half_split_to_interleaved(torch.ones(6), 3), "head_dim even"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_are_not_written_and_empty_ones_pass(generator):
    x, at = draw(generator), torch.arange(7)
    before = x.clone()
    assert torch.equal(rope(x, at), rope(x, at)) and torch.equal(x, before)
    assert rope(x[:, :, :0], at[:0]).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_turned_back(layout, generator):
    """Oracle: theorem, the gradient of a rotation is the inverse rotation; and gradcheck."""
    x, weight = draw(generator, batch=1, heads=1).requires_grad_(), draw(generator, batch=1, heads=1)
    (gradient,) = torch.autograd.grad((rope(x, torch.arange(7), layout=layout) * weight).sum(), x)
    assert_close(gradient, rope(weight, -torch.arange(7), layout=layout))
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.arange(7), layout=layout), x)


def test_follows_the_inputs_device(device, generator):
    """Oracle: the same on the processor."""
    x, at = draw(generator, dtype=torch.float32), torch.arange(7)
    assert_close(rope(x.to(device), at.to(device)).cpu(), rope(x, at))
