"""The arena of the caches' speed, on a small layer: what is counted, what is timed, and what attention is given."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.arena import kv_speed as arena
from refimpl.arena.protocol import Conditions
from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.model.cache import FullCache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "CHUNK": 100, "BANDWIDTH_BYTES": 2**20}.items():
        monkeypatch.setattr(arena, name, value)


def conditions(tokens=300):
    return Conditions(torch.Generator().manual_seed(0), axes={"tokens": tokens}, quick=True)


def ticking(monkeypatch, *seconds):
    """A clock by which the caches' turns take these seconds, again and again."""
    now, turns = [0.0], [0]

    def clock(device):
        if turns[0] % 2:
            now[0] += seconds[turns[0] // 2 % len(seconds)]
        turns[0] += 1
        return now[0]

    monkeypatch.setattr(arena, "clock", clock)


def test_bytes_are_those_held_against_sixteen_bits_of_all_tokens():
    """Oracle: arithmetic: of 304 tokens 256 keys and 176 values in 2 bits, with scale and minimum a group of 32, the rest
    in 16; and some room to append."""
    figures = arena.measure(KIVI, {"bits": 2}, conditions())
    assert list(figures) == [metric.name for metric in arena.METRICS]
    row = 2 * 32  # numbers of a token
    expected = ((256 + 176) * (2 + 32 / 32) + ((304 - 256) + (304 - 176)) * 16) * row / 8
    assert expected < figures["bytes"] < 1.05 * expected
    assert figures["compression"] == 2 * 304 * row * 2 / figures["bytes"]
    assert all(figures[name] > 0 for name in ("compress_seconds", "seconds_per_token", "slowdown", "floor_seconds"))


def test_a_compression_is_a_budget_and_the_baseline_holds_all():
    full, part = arena.baseline(conditions()), arena.measure(StreamingLLM, {"compression": 4}, conditions())
    assert full["bytes"] == 2 * 2 * 32 * 2 * (300 + arena.STEPS + 1)
    assert part["compression"] > 3 and part["bytes"] < full["bytes"] / 3


def test_steps_take_turns_and_the_price_is_what_a_gigabyte_less_costs(monkeypatch):
    """Oracle: by hand, by a clock: three chunks and the end of the prompt take a second each, then steps of 2 s with the full
    cache and 5 s with ours; and what is read costs what the copy took."""
    ticking(monkeypatch, *[1.0] * 4, *[2.0, 5.0] * 4, *[0.5] * 9)
    monkeypatch.setattr(arena, "read_seconds", lambda device: 0.25)
    figures = arena.measure(KIVI, {"bits": 2}, conditions())
    assert figures["compress_seconds"] == 4
    assert (figures["seconds_per_token"], figures["slowdown"]) == (5, 2.5)
    whole = 2 * 2 * 32 * 2 * (300 + arena.STEPS + 1)
    assert figures["price"] == pytest.approx(3 / ((whole - figures["bytes"]) / 1e9))
    assert figures["floor_seconds"] == pytest.approx(0.25 * figures["bytes"] / 1e9)


def test_reading_is_timed_by_a_copy_that_reads_and_writes(monkeypatch):
    """Oracle: by hand: half a second for two times 2^20 bytes."""
    ticking(monkeypatch, 0.5)
    assert arena.read_seconds(CPU) == pytest.approx(0.5 / (2 * 2**20) * 1e9)


def test_a_query_attends_to_what_the_cache_holds(generator):
    """Oracle: attention by PyTorch over all keys and values."""
    layer, cache = arena.Layer(arena.config_of(40), CPU), FullCache()
    prompt, token = (torch.randn(3, 1, 4, time, 32, generator=generator) for time in (40, 1))
    layer.take(prompt, cache)
    k, v = (torch.cat((prompt[i, :, :2], token[i, :, :2]), dim=2) for i in (1, 2))
    expected = F.scaled_dot_product_attention(token[0], k, v, enable_gqa=True)
    assert_close(layer.attend(token, cache), expected)


def test_what_is_no_cache_is_refused():
    with pytest.raises(TypeError, match=r"dict has no `cache\(config\)`"):
        arena.measure(dict, {}, conditions())
