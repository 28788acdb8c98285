"""The serving arena: its figures, its trace, and that all methods meet the same one."""

from types import SimpleNamespace

import pytest
import torch

from refimpl.arena import serving as arena
from refimpl.arena.protocol import Conditions
from refimpl.inference.system_level.design.continuous_batching import ContinuousBatching
from refimpl.inference.system_level.optimization.prefix_caching import PrefixCaching
from refimpl.inference.system_level.static_batching import StaticBatching
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_

CONFIG = Config(vocabulary=61, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
TEXT = torch.randint(0, 61, (500,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """A tiny model, and few short requests."""
    model = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.3).eval()
    monkeypatch.setattr(
        arena.testbed, "subject", lambda path, device: SimpleNamespace(model=model, text=lambda split, n: TEXT)
    )
    for name, value in {"REQUESTS": 10, "QUICK_REQUESTS": 4, "LONGEST": 24, "PREAMBLE": 8, "ASKED": 12}.items():
        monkeypatch.setattr(arena, name, value)
    return model


def conditions(seed=4, **given):
    return Conditions(torch.Generator().manual_seed(seed), **given)


@pytest.mark.parametrize("memory", [60, 500])
def test_figures_are_those_announced_and_repeat(memory):
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    for run in (arena.baseline, lambda given: arena.measure(ContinuousBatching, {}, given)):
        first, second = (run(conditions(axes={"memory": memory})) for _ in range(2))
        assert list(first) == [metric.name for metric in arena.METRICS]
        assert [first[name] for name in exact] == [second[name] for name in exact]
        assert first["identical"] == 1 and first["peak_bytes"] <= memory * 2 * 8 * 4
        assert 0 < first["peak_used"] <= 1 and 0 < first["share_used"] <= 1 and first["tokens_per_second"] > 0


def test_the_trace_is_what_it_says(model):
    """Oracle: `generate` for each request alone; lengths within their bounds; every other prompt begins with one of two preambles."""
    requests, alone = arena.trace(model, TEXT, conditions())
    assert len(requests) == 10 and len(arena.trace(model, TEXT, conditions(quick=True))[0]) == 4
    for request, answer in zip(requests, alone, strict=True):
        assert generate(model, torch.tensor([request.prompt]), request.n, stop=request.stop)[0].tolist() == answer
        assert request.n == 12 and 1 <= len(answer) <= 12
    own = [len(request.prompt) - 8 * (i % 2) for i, request in enumerate(requests)]
    assert 16 <= min(own) < max(own) <= 24
    begins = [request.prompt[:8] for request in requests]
    assert begins[1] == begins[5] == begins[9] and begins[3] == begins[7] and len({*begins}) == 7
    arrivals = [request.arrival for request in requests]
    assert arrivals == sorted(arrivals) and len({len(answer) for answer in alone}) > 2


def test_a_seed_makes_another_trace(model):
    assert arena.trace(model, TEXT, conditions(4))[0] != arena.trace(model, TEXT, conditions(5))[0]


def test_what_is_found_in_a_cache_is_told(model):
    """Oracle: by hand: with room for all, who comes later finds the preamble that was read before, and who shares none finds nothing;
    whoever keeps nothing finds nothing. A first token takes an iteration at least, and half of them no longer than nearly all.
    """
    requests, _ = arena.trace(model, TEXT, conditions())
    plain = arena.baseline(conditions(axes={"memory": 4000}))
    found = arena.measure(PrefixCaching, {}, conditions(axes={"memory": 4000}))
    most = sum(8 * (len(alike) - 1) for alike in (requests[1::4], requests[3::4]))
    assert plain["hit_rate"] == 0 < found["hit_rate"] <= most / sum(len(request.prompt) for request in requests)
    for figures in (plain, found):
        assert 1 <= figures["first_token_p50"] <= figures["first_token_p99"]
    assert found["first_token_p99"] < plain["first_token_p99"]  # who waits for a whole batch waits longest


def test_wrong_answers_are_seen():
    """Negative control of `identical`: a method that changes a token of one answer in four."""

    class Careless(StaticBatching):
        def serve(self, model, requests, watch=None):
            served = super().serve(model, requests, watch)
            served.tokens[0][0] += 1
            return served

    assert arena.measure(Careless, {}, conditions(quick=True))["identical"] == 0.75


def test_settings_slots_and_memory_reach_the_method():
    """Oracle: what the method was made with."""
    made = []

    def method(**given):
        made.append(given)
        return StaticBatching(**given)

    arena.measure(method, {}, conditions(quick=True, axes={"memory": 77}))
    assert made == [{"slots": arena.SLOTS, "memory": 77}]
