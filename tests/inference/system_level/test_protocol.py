"""What holds for every way of serving; the list of methods is the taxonomy's, and static batching is held to the same."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml

import taxonomy
from refimpl.inference.system_level.protocol import Request, entry_bytes
from refimpl.inference.system_level.static_batching import StaticBatching
from tests.inference.system_level.traces import alone, tensors, trace

METHODS = taxonomy.load().find(category="inference/system_level", implemented=True)
SCARCE = 32  # entries: the longest request takes 25


@pytest.fixture(params=[None, *METHODS], ids=lambda method: method.id if method else "static")
def method(request):
    """A method at its default settings, but with fewer slots than requests."""
    return replace(request.param.load()() if request.param else StaticBatching(), slots=4)


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("memory", [4096, SCARCE])
def test_answers_are_those_of_a_request_alone(method, model, generator, memory):
    """Oracle: `generate`, which transformers' tokens hold; without stop tokens, and with those that end answers early.

    One request has one token, two begin alike, two and three arrive together, the last finds nobody. Where memory is scarce, requests
    must wait or are made to give it up.
    """
    requests = trace(generator, common=3)
    expected = [alone(model, request) for request in requests]
    method = replace(method, memory=memory)
    assert method.serve(model, requests).tokens == expected
    early = [
        replace(request, stop=frozenset({answer[len(answer) // 2]}))
        for request, answer in zip(requests, expected, strict=True)
    ]
    ended = method.serve(model, early).tokens
    assert ended == [alone(model, request) for request in early]
    assert sum(len(answer) for answer in ended) < sum(len(answer) for answer in expected)  # control


def test_answers_do_not_depend_on_the_order_of_arrival(method, plain, generator):
    """Oracle: `generate`; all at once in another order, and one after another."""
    requests = trace(generator, common=3)
    expected = [alone(plain, request) for request in requests]
    at_once = [replace(request, arrival=0) for request in requests[::-1]]
    assert replace(method, memory=SCARCE).serve(plain, at_once).tokens == expected[::-1]
    apart = [replace(request, arrival=100 * i) for i, request in enumerate(requests)]
    served = method.serve(plain, apart)
    assert served.tokens == expected and served.waiting == 0 and served.admitted == served.arrival


def test_memory_is_never_exceeded_and_nothing_is_left(method, plain, generator):
    """Oracle: the storages of all tensors that can be reached, summed up here, and the entries of the requests that run."""
    requests = trace(generator)
    method, held, seen = replace(method, memory=SCARCE), [], []
    each = entry_bytes(plain.config, torch.float32)

    def watch(store):
        held.append(store.held)
        seen.append(store)
        assert store.held <= sum(tensors(store).values()) <= SCARCE * each

    served = method.serve(plain, requests, watch)
    assert served.held == held and len(held) == served.iterations
    assert all(0 < used <= taken for used, taken in zip(served.used, served.held, strict=True))
    assert max(served.used) <= SCARCE * each and served.peak_bytes == max(held)
    assert all(store.held == 0 for store in seen)


def test_weights_and_caches_lie_on_the_device(method, model, generator):
    """Oracle: the storages of all tensors of the model and of the store, summed up here; whoever can offload, but has room, adds buffers."""
    method, there = replace(method, device=1.0) if hasattr(method, "device") else method, []
    weights = tensors(dict(model.named_parameters()))
    served = method.serve(model, trace(generator), lambda store: there.append(sum((weights | tensors(store)).values())))
    beside = [device - found for device, found in zip(served.device, there, strict=True)]
    assert served.device_bytes == max(served.device)
    assert all(x > 0 for x in beside) if hasattr(method, "device") else not any(beside)


def test_counts_fit_together(method, plain, generator):
    """Oracle: by hand: a token a request and iteration; nobody is served before arriving, or is answered before the last token."""
    requests = trace(generator)
    for memory in (4096, SCARCE):
        served = replace(method, memory=memory).serve(plain, requests)
        assert sum(served.running) == sum(len(answer) for answer in served.tokens) == sum(r.n for r in requests)
        assert served.slots == 4 and max(served.running) <= 4 and 0 < served.utilization <= 1
        assert served.arrival == [request.arrival for request in requests]
        for request, *times in zip(requests, served.arrival, served.admitted, served.first, served.ended, strict=True):
            assert times == sorted(times) and times[3] - times[2] >= request.n - 1
        assert served.prefill_tokens >= 23
        assert served.seconds > 0


def test_nothing_of_one_call_is_left_for_the_next(method, plain, generator):
    """Oracle: the call again after another one; the model and the configuration as they were."""
    requests, before = trace(generator), {name: value.clone() for name, value in plain.state_dict().items()}
    settings = asdict(method)
    first = method.serve(plain, requests)
    method.serve(plain, trace(generator))
    again = method.serve(plain, requests)
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert asdict(method) == settings


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(method, plain, generator, dtype):
    """Oracle: `generate` in float64; in bfloat16 rounding may decide, so that lengths and bytes are left."""
    requests, plain = trace(generator), plain.to(dtype)
    served = method.serve(plain, requests)
    assert served.peak_used % entry_bytes(plain.config, dtype) == 0
    if dtype == torch.float64:
        assert served.tokens == [alone(plain, request) for request in requests]
    else:
        assert [len(answer) for answer in served.tokens] == [request.n for request in requests]


def test_a_single_request(method, plain):
    """Oracle: by hand: a prompt of one token and one new one take one iteration and one entry."""
    served = method.serve(plain, [Request(prompt=(5,), n=1, arrival=7)])
    assert served.iterations == 1 and served.admitted == served.ended == [7] and served.prefill_tokens == 1
    assert served.peak_used == entry_bytes(plain.config, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": (5,) * 31, "n": 3}, "take 33 entries, and the memory holds 32: give more of it"),
        ({"prompt": ()}, r"requests\[1\]: tokens of shape \(1, 0\)"),
        ({"prompt": (5, 61)}, r"requests\[1\]: tokens range from 5 to 61"),
        ({"n": 0}, r"requests\[1\]: n=0"),
        ({"arrival": -1}, r"requests\[1\]: arrival=-1"),
    ],
)
def test_requests_are_checked_before_anything_is_computed(method, plain, change, message):
    plain.embedding.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    good = Request(prompt=(5,), n=2)
    with pytest.raises(ValueError, match=message):
        replace(method, memory=SCARCE).serve(plain, [good, replace(good, **change)])


def test_settings_are_checked(method, plain):
    good = [Request(prompt=(5,), n=2)]
    for given, message in (({"slots": 0}, "slots=0"), ({"memory": 0}, "memory=0")):
        with pytest.raises(ValueError, match=message):
            replace(method, **given).serve(plain, good)
    with pytest.raises(ValueError, match="requests is empty"):
        method.serve(plain, [])


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method
