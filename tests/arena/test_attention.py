"""The attention arena: exact attention gets full marks, and the figures repeat."""

from pathlib import Path

import pytest
import torch

from refimpl.architecture.attention.kernel_low_rank.linear_attention import LinearAttention
from refimpl.arena import attention as arena
from refimpl.arena.protocol import Conditions

CPU = torch.device("cpu")


def seeded():
    return torch.Generator().manual_seed(4)


def test_exact_attention_makes_no_error_and_recalls_everything():
    """Oracle: by hand; a cache of 4,096 tokens, keys and values, 4 heads of 32, 2 bytes a number."""
    figures = arena.baseline(Conditions(seeded()))
    assert list(figures) == [metric.name for metric in arena.METRICS]
    assert figures["error"] == 0 and figures["recall"] == 1
    assert figures["flops_exponent"] == pytest.approx(2)
    assert figures["state_bytes_4096"] == 4096 * 2 * 4 * 32 * 2


def test_a_method_repeats_from_a_seed():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    first, second = (arena.measure(LinearAttention, {"chunk": 32}, Conditions(seeded())) for _ in range(2))
    assert [first[name] for name in exact] == [second[name] for name in exact]
    assert first["error"] > 0.1 and first["recall"] < 1
    assert first["flops_exponent"] == pytest.approx(1)
    assert first["state_bytes_4096"] == 4 * (32 * 32 + 32) * 4


def test_blind_attention_recalls_by_chance_only():
    """Oracle: chance, one of 16: the mean of all values, whatever is asked."""

    class Mean(LinearAttention):
        def __call__(self, q, k, v, *, causal=True):
            return v.cumsum(dim=2)

    recalled = sum(arena._recall(Mean(), torch.Generator().manual_seed(seed), CPU) for seed in range(20)) / 20
    assert recalled == pytest.approx(1 / 16, abs=0.01)


def test_quick_repeats_the_clock_less_and_nothing_else():
    """Oracle: calls of the method; one to warm up, then one or five."""
    calls = []

    class Counted(LinearAttention):
        def __call__(self, q, k, v, *, causal=True):
            calls[-1] += 1
            return super().__call__(q, k, v, causal=causal)

    figures = []
    for quick in (True, False):
        calls.append(0)
        figures.append(arena.measure(Counted, {}, Conditions(seeded(), quick=quick)))
    assert calls[1] - calls[0] == 4
    assert figures[0]["error"] == figures[1]["error"]


def test_a_model_is_refused():
    with pytest.raises(ValueError, match="substrate is synthetic"):
        arena.baseline(Conditions(seeded(), model=Path("here")))
