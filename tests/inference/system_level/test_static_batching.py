"""Static batching. Oracle: by hand, and the closed form of its utilization."""

import pytest
import torch

from refimpl.inference.system_level.protocol import Request, entry_bytes
from refimpl.inference.system_level.static_batching import StaticBatching, reserved
from tests.inference.system_level.traces import alone, trace


def test_batches_by_hand(plain):
    """Oracle: by hand: two slots; the third waits for both, and answers are given when the whole batch is done."""
    requests = [Request(prompt=(5, 7, 9), n=2), Request(prompt=(8,), n=5), Request(prompt=(4,), n=1, arrival=1)]
    served = StaticBatching(slots=2).serve(plain, requests)
    assert served.admitted == [0, 0, 5] and served.first == [0, 0, 5] and served.ended == [4, 4, 5]
    assert served.running == [2, 2, 1, 1, 1, 1] and served.prefill_tokens == 2 * 3 + 1
    each = entry_bytes(plain.config, torch.float32)
    assert served.held == [2 * 7 * each] * 5 + [each]
    assert served.used == [(3 + 1) * each, (4 + 2) * each, 3 * each, 4 * each, 5 * each, each]


def test_utilization_is_the_closed_form(plain, generator):
    """Oracle: closed form: the sum of the lengths over slots times the longest, for one batch."""
    lengths = [3, 9, 1, 4]
    served = StaticBatching(slots=4).serve(plain, trace(generator, [(5, n, 0) for n in lengths]))
    assert served.utilization == pytest.approx(sum(lengths) / (4 * max(lengths)))


def test_a_batch_is_as_large_as_the_memory_allows(plain, generator):
    """Oracle: by hand: three requests together would need 3 * (6 + 9 - 1) entries, the first two 2 * (2 + 9 - 1), the others 2 * (6 + 3 - 1)."""
    requests = trace(generator, [(2, 9, 0), (2, 3, 0), (6, 2, 0)])
    assert reserved(requests) == 14 and reserved(requests[:2]) == 10
    for memory, admitted in ((41, [0, 0, 9]), (42, [0, 0, 0]), (19, [0, 9, 9]), (16, [0, 9, 9]), (15, [0, 9, 12])):
        served = StaticBatching(slots=3, memory=memory).serve(plain, requests)
        assert served.admitted == admitted and max(served.held) <= memory * entry_bytes(plain.config, torch.float32)
        assert served.tokens == [alone(plain, request) for request in requests]
