"""Linear attention: the paper's sums written out, its three forms, their gradients, and the state between calls."""

import math

import pytest
import torch
from torch.nn.functional import elu
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from refimpl.architecture.attention.kernel_low_rank.linear_attention import (
    LinearAttention,
    State,
    elu_plus_one,
    linear_attention_chunked,
    linear_attention_parallel,
    linear_attention_recurrent,
)
from refimpl.architecture.attention.protocol import Softmax

FORMS = [linear_attention_parallel, linear_attention_chunked, linear_attention_recurrent]
SHAPES = [(1, 1, 1, 1), (2, 4, 2, 7), (1, 2, 1, 65), (3, 6, 3, 64), (1, 2, 2, 130)]  # batch, heads, key heads, time


def draw(generator, batch=2, heads=4, kv_heads=2, time=7, dim=5, value_dim=3, dtype=torch.float64):
    shapes = [(batch, heads, time, dim), (batch, kv_heads, time, dim), (batch, kv_heads, time, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(q, k, v, causal=True, similarity=lambda a, b: (elu(a) + 1) @ (elu(b) + 1), eps=0.0):
    """Eq. (8), or Eq. (3) if not causal, as two loops over positions."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).reshape(-1, 3).tolist():
        seen = range(i + 1) if causal else range(k.shape[2])
        weights = torch.stack([similarity(q[b, h, i], k[b, h, j]) for j in seen])
        out[b, h, i] = (weights[:, None] * v[b, h, : len(seen)]).sum(dim=0) / (weights.sum() + eps)
    return out


def features(q, k, v):
    return elu_plus_one(q), elu_plus_one(k), v


def test_worked_by_hand():
    """Oracle: by hand. phi(q) = 3 and 1, phi(k) = 1 and 2, v = 4 and 7: first 4, then (1 * 4 + 2 * 7) / (1 + 2) = 6."""
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([2.0, 0.0], [0.0, 1.0], [4.0, 7.0]))
    assert LinearAttention(eps=0.0)(q, k, v).flatten().tolist() == [4.0, 6.0]
    assert LinearAttention(eps=0.0)(q, k, v, causal=False).flatten().tolist() == [6.0, 6.0]
    assert LinearAttention(eps=1.0)(q, k, v).flatten().tolist() == [3.0, 4.5]  # 3 * 4 / (3 + 1), 18 / (3 + 1)


def test_features_worked_by_hand():
    """Oracle: by hand, x + 1 above 0 and exp(x) below, positive everywhere; the slope at 0 is 1 from both sides."""
    x = torch.tensor([-math.log(4), 0.0, 1.5], requires_grad=True)
    assert_close(elu_plus_one(x), torch.tensor([0.25, 1.0, 2.5]))
    assert_close(torch.autograd.grad(elu_plus_one(x).sum(), x)[0], torch.tensor([0.25, 1.0, 1.0]))


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "time"), SHAPES[:3])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_sums_written_out(batch, heads, kv_heads, time, causal, generator):
    """Oracle: brute force in float64, Eqs. (8) and (3) with the similarity of Eq. (7), pair by pair."""
    q, k, v = draw(generator, batch, heads, kv_heads, time)
    out = LinearAttention(eps=1e-3)(q, k, v, causal=causal)
    assert_close(out, written_out(q, k, v, causal, eps=1e-3))
    if time > 1:
        assert (out - written_out(q, k, v, not causal, eps=1e-3)).abs().max() > 0.01  # negative control: the mask
        assert (out - Softmax()(q, k, v, causal=causal)).abs().max() > 0.01  # negative control: another kernel


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "similarity_and_map",
    [
        pytest.param(
            (lambda a, b: (a @ b) ** 2, lambda x: (x[..., :, None] * x[..., None, :]).flatten(-2)), id="squared"
        ),
        pytest.param(
            (lambda a, b: 1 + a @ b / 40, lambda x: torch.nn.functional.pad(x / 40**0.5, (0, 1), value=1.0)),
            id="affine",
        ),
    ],
)
def test_any_feature_map(form, similarity_and_map, generator):
    """Oracle: brute force with the kernel itself (Eq. 8), which the features only factor: what a variant relies on."""
    similarity, phi = similarity_and_map
    q, k, v = draw(generator)
    assert_close(form(phi(q), phi(k), v, eps=0.0)[0], written_out(q, k, v, similarity=similarity))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "time"), SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_forms_agree(form, batch, heads, kv_heads, time, causal, generator):
    """Oracle: the parallel form, from an empty state and from one with a past."""
    q, k, v = features(*draw(generator, batch, heads, kv_heads, time))
    _, past = linear_attention_parallel(*features(*draw(generator, batch, heads, kv_heads, 9)))
    for state in (None, past):
        assert_close(
            form(q, k, v, causal=causal, state=state), linear_attention_parallel(q, k, v, causal=causal, state=state)
        )


@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 33, 1000])
def test_any_chunk_gives_the_same(chunk, generator):
    """Oracle: the recurrent form, at a length that few chunks divide."""
    q, k, v = features(*draw(generator, time=33))
    assert_close(linear_attention_chunked(q, k, v, chunk=chunk), linear_attention_recurrent(q, k, v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_those_of_the_sums_written_out(form, causal, generator):
    """Oracle: autograd of brute force, and gradcheck."""
    inputs = [x.requires_grad_() for x in draw(generator, batch=1, heads=2, kv_heads=1, time=5)]
    weight = torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((form(*features(*inputs), causal=causal, eps=0.1)[0] * weight).sum(), inputs)
    theirs = torch.autograd.grad((written_out(*inputs, causal, eps=0.1) * weight).sum(), inputs)
    assert_close(ours, theirs)

    def outputs(*x):
        out, state = form(*features(*x), causal=causal)
        return out, *state

    assert torch.autograd.gradcheck(outputs, inputs)


def test_gradients_reach_through_the_state(generator):
    """Oracle: autograd of the whole; the first half trains on the second half's loss."""
    q, k, v = features(*draw(generator, time=8))
    k = k.requires_grad_()
    whole = torch.autograd.grad(linear_attention_chunked(q, k, v)[0][:, :, 4:].sum(), k)
    _, state = linear_attention_chunked(q[:, :, :4], k[:, :, :4], v[:, :, :4])
    out, _ = linear_attention_chunked(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], state=state)
    assert_close(torch.autograd.grad(out.sum(), k), whole)


@pytest.mark.parametrize("cuts", [[1] * 11, [5, 6], [1, 1, 9], [3, 1, 4, 3]])
def test_pieces_equal_the_whole(cuts, generator):
    """Oracle: the whole in one call; the state goes from call to call, and none of them writes it."""
    method = LinearAttention(chunk=4)
    q, k, v = draw(generator, time=11)
    state, outs = None, []
    for piece in zip(*(x.split(cuts, dim=2) for x in (q, k, v)), strict=True):
        before = None if state is None else State(state.S.clone(), state.z.clone())
        out, after = method.decode(*piece, state)
        assert before is None or (torch.equal(state.S, before.S) and torch.equal(state.z, before.z))
        outs, state = [*outs, out], after
    assert_close(torch.cat(outs, dim=2), method(q, k, v))
    phi = elu_plus_one(k)
    assert_close(state, State(phi.mT @ v, phi.sum(dim=2)))  # Eqs. (10) and (11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator):
    """Oracle: float64 on the same inputs, over 4,096 positions; half precision sums in float32, so only its output rounds."""
    q, k, v = draw(generator, batch=1, heads=2, time=4096, dim=8, dtype=dtype)
    out, state = LinearAttention().decode(q, k, v)
    exact = LinearAttention()(q.double(), k.double(), v.double())
    assert out.dtype == dtype and state.S.dtype == torch.promote_types(dtype, torch.float32)
    rounding = torch.finfo(state.S.dtype).eps * 64  # of sums over 4,096 positions, relative to values of size 1
    assert_close(out, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=rounding)


@pytest.mark.parametrize("form", FORMS)
def test_follows_the_inputs_device(form, device, generator):
    """Oracle: the same on the processor."""
    inputs = features(*draw(generator, time=65))
    out, state = form(*(x.to(device) for x in inputs))
    assert_close((out.cpu(), *(x.cpu() for x in state)), (form(*inputs)[0], *form(*inputs)[1]))


def test_constant_values_come_back(generator):
    """Oracle: weights that add up to one leave a constant as it is; eps takes away what it adds below."""
    q, k, _ = draw(generator, time=33)
    ones = torch.ones(2, 2, 33, 1, dtype=torch.float64)
    assert_close(LinearAttention(eps=0.0)(q, k, ones), torch.ones(2, 4, 33, 1, dtype=torch.float64))
    assert (LinearAttention(eps=1.0)(q, k, ones) < 1).all()


def test_queries_need_not_be_as_many_as_keys(generator):
    """Oracle: brute force; without a mask, cross-attention."""
    q, (_, k, v) = draw(generator, time=3)[0], draw(generator, time=9)
    for form in FORMS:
        assert_close(form(*features(q, k, v), causal=False, eps=0.0)[0], written_out(q, k, v, causal=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"eps": -1e-6}, "eps=-1e-06 must not be negative"), ({"chunk": 0}, "chunk=0 must be at least 1")],
)
def test_configuration_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**settings)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_do_not_fit_are_refused(form, generator):
    q, k, v = draw(generator)
    _, state = form(q, k, v)
    for bad, message in [
        ((q[0], k, v), r"q of shape \(4, 7, 5\) must be"),
        ((q, k, v[:, :, :0]), "none of them 0"),
        ((q, k, v[:, :, :6]), "do not fit together"),
        ((q[..., :4], k, v), "do not fit together"),
        ((q[:, :3], k, v), "3 query heads are no multiple of 2 key heads"),
        ((q[:, :, :6], k, v), "as many queries as keys, not 6 and 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            form(*bad)
    with pytest.raises(ValueError, match="is not of these keys and values"):
        form(q, k, v[..., :2], state=state)
    with pytest.raises(ValueError, match="chunk=0"):
        linear_attention_chunked(q, k, v, chunk=0)


def counted(method, time, generator):
    x = torch.randn(1, 2, time, 16, generator=generator)
    with FlopCounterMode(display=False) as counter:
        method(x, x, x)
    return counter.get_total_flops()


def test_claim_linear_time(claim, generator):
    """Power of the length with which the operations of matrix products grow, from 512 to 4,096 positions."""

    def power(method):
        return math.log(counted(method, 4096, generator) / counted(method, 512, generator), 8)

    whole = power(lambda q, k, v: linear_attention_parallel(q, k, v))
    assert whole > 1.9  # negative control: the form that makes the whole square is seen as quadratic
    claim("linear-attention", "linear-time", power(LinearAttention()))


def test_claim_constant_state(claim, generator):
    """Bytes that a decoder holds after 4,096 tokens over those after 64."""
    short, long = (draw(generator, time=time, dtype=torch.float32)[1:] for time in (64, 4096))
    method = LinearAttention()
    assert method.state_bytes(*short) == 2 * 2 * (5 * 3 + 5) * 4  # by hand: batch, key heads, S and z, float32
    assert Softmax().state_bytes(*long) == 64 * Softmax().state_bytes(*short)  # negative control: a cache grows
    claim("linear-attention", "constant-state", method.state_bytes(*long) / method.state_bytes(*short))


def test_claim_training_memory(claim, generator):
    """Bytes kept for the gradient over those of a state for every position, at 64 dimensions and 1,024 positions."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = (torch.randn(1, 1, 1024, 64, generator=generator, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = LinearAttention()(q, k, v)
    assert out.requires_grad
    claim("linear-attention", "training-memory", sum(kept.values()) / (1024 * (64 * 64 + 64) * 4))
