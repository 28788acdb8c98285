"""The attention arena: exact attention gets full marks, and the figures repeat."""

import pytest
import torch

from refimpl.architecture.attention.kernel_low_rank.linear_attention import LinearAttention
from refimpl.arena import attention as arena

CPU = torch.device("cpu")


def seeded():
    return torch.Generator().manual_seed(4)


def test_exact_attention_makes_no_error_and_recalls_everything():
    """Oracle: by hand; a cache of 4,096 tokens, keys and values, 4 heads of 32, 2 bytes a number."""
    figures = arena.baseline(seeded(), CPU)
    assert list(figures) == [metric.name for metric in arena.METRICS]
    assert figures["error"] == 0 and figures["recall"] == 1
    assert figures["flops_exponent"] == pytest.approx(2)
    assert figures["state_bytes_4096"] == 4096 * 2 * 4 * 32 * 2


def test_a_method_repeats_from_a_seed():
    exact = [metric.name for metric in arena.METRICS if metric.exact]
    first, second = (arena.measure(LinearAttention, {"chunk": 32}, seeded(), CPU) for _ in range(2))
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
