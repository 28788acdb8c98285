"""What holds for every attention method; the list of methods is the taxonomy's."""

import math
from dataclasses import asdict

import pytest
import torch
import yaml
from torch.testing import assert_close

import taxonomy
from refimpl.architecture.attention.protocol import Attention, Softmax

METHODS = taxonomy.load().find(category="architecture/attention", implemented=True)


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def entry(request):
    """A method as the taxonomy knows it."""
    return request.param


@pytest.fixture
def method(entry):
    """The method at its default settings."""
    return entry.load()()


@pytest.fixture(params=[True, False], ids=["causal", "all"])
def causal(request, method):
    """Both directions, as far as the method is defined for them."""
    x = torch.ones(1, 1, 2, 4)
    try:
        method(x, x, x, causal=request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def draw(time=33, heads=4, kv_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, time, d, generator=generator) for h, d in ((heads, 8), (kv_heads, 8), (kv_heads, 6))]


def test_there_are_methods():
    assert METHODS


def test_one_direction_at_least_is_defined(method):
    assert isinstance(method, Attention)
    done = []
    for causal in (True, False):
        try:
            done.append(method(*draw(), causal=causal).shape)
        except NotImplementedError:
            continue
    assert set(done) == {(3, 4, 33, 6)}


@pytest.mark.parametrize("time", [1, 2, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_dtype_and_finite(method, causal, time, dtype):
    q, k, v = (x.to(dtype) for x in draw(time))
    out = method(q, k, v, causal=causal)
    assert out.shape == (3, 4, time, 6) and out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("split", [1, 16, 32])
def test_the_future_is_not_seen(method, split):
    """Oracle: other keys and values after position `split` change later outputs, and no earlier one."""
    q, k, v = draw()
    other = [
        torch.cat((x[:, :, :split], y[:, :, split:]), dim=2) for x, y in zip((k, v), draw(seed=1)[1:], strict=True)
    ]
    try:
        out, changed = method(q, k, v, causal=True), method(q, *other, causal=True)
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert_close(changed[:, :, :split], out[:, :, :split])
    assert (changed - out)[:, :, split:].abs().max() > 1e-3  # negative control


def test_a_batch_equals_its_rows(method, causal):
    q, k, v = draw()
    rows = [method(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=causal) for i in range(3)]
    assert_close(method(q, k, v, causal=causal), torch.cat(rows))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(entry, method, causal, kv_heads):
    """Oracle: each key head repeated for the query heads that read it, one after the other."""
    if not entry.facets.gqa:
        pytest.skip("facet gqa: false")
    q, k, v = draw(kv_heads=kv_heads)
    repeated = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    assert_close(method(q, k, v, causal=causal), method(q, *repeated, causal=causal))


def test_inputs_are_not_written_and_the_next_call_is_the_same(method, causal):
    inputs = draw()
    before = [x.clone() for x in inputs]
    first = method(*inputs, causal=causal)
    method(*draw(seed=1), causal=causal)
    assert torch.equal(method(*inputs, causal=causal), first)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_gradients_reach_queries_keys_and_values(method, causal):
    inputs = [x.requires_grad_() for x in draw()]
    gradients = torch.autograd.grad(method(*inputs, causal=causal).pow(2).sum(), inputs)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_the_decoders_state_is_counted(method):
    """Oracle: nobody holds more than every key and value twice over, nor nothing."""
    _, k, v = draw(time=130)
    assert 0 < method.state_bytes(k, v) <= 2 * (k.nbytes + v.nbytes)


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


@pytest.mark.parametrize(
    "shapes", [[(4, 5, 8)] * 3, [(1, 2, 5, 8), (1, 2, 5, 7), (1, 2, 5, 8)], [(1, 3, 5, 8), *[(1, 2, 5, 8)] * 2]]
)
def test_shapes_that_do_not_fit_are_refused(method, shapes):
    with pytest.raises(ValueError, match=r"must be|do not fit|no multiple"):
        method(*(torch.ones(shape) for shape in shapes))


def test_softmax_worked_by_hand():
    """Oracle: by hand. Scores 0 and log 3 weigh 1/4 and 3/4: first 4, then 0.25 * 4 + 0.75 * 8 = 7."""
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([1.0, 1.0], [0.0, math.log(3)], [4.0, 8.0]))
    assert_close(Softmax()(q, k, v).flatten(), torch.tensor([4.0, 7.0]))
    assert_close(Softmax()(q, k, v, causal=False).flatten(), torch.tensor([7.0, 7.0]))
