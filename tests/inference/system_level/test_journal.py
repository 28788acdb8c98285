"""The record of serving. Oracle: by hand."""

from refimpl.inference.system_level.journal import Journal
from refimpl.inference.system_level.protocol import Request


def test_written_by_hand():
    """Oracle: by hand: the second request is given up once and read again, which leaves its admission, its first token and what was found
    of its prompt as they were.
    """
    journal = Journal([Request(prompt=(5,), n=2), Request(prompt=(8, 9), n=2, arrival=1)], slots=2, weights=1000)
    journal.admit(0, prefill=1)
    journal.token(0, 3)
    journal.iteration(running=1, held=40, used=10)
    journal.admit(1, prefill=1, found=1)
    journal.token(0, 4)
    journal.token(1, 7)
    journal.end(0)
    journal.iteration(running=2, held=80, used=60, device=300)
    journal.preemptions += 1
    journal.admit(1, prefill=1, found=2)
    journal.token(1, 6)
    journal.end(1)
    journal.iteration(running=1, held=80, used=20)
    served = journal.served()
    assert served.tokens == [[3, 4], [7, 6]] and served.arrival == [0, 1]
    assert served.admitted == served.first == [0, 1] and served.ended == [1, 2]
    assert served.iterations == journal.clock == 3 and served.utilization == 4 / 6 and served.waiting == 0
    assert served.peak_bytes == 80 and served.peak_used == 60 and served.share_used == 90 / 200
    assert served.device == [1040, 300, 1080] and served.device_bytes == 1080
    assert served.prefill_tokens == 3 and served.found_tokens == 1 and served.hit_rate == 1 / 3
    assert served.preemptions == 1 and served.seconds >= 0


def test_percentiles_by_hand():
    """Oracle: by hand, nearest rank: of first tokens after 1, 2, 3, 4 and 9 iterations half have three at most, 80 % four, 81 % and more nine."""
    journal = Journal([Request(prompt=(5,), n=1, arrival=i) for i in (4, 3, 2, 1, 0)], slots=5, weights=0)
    for i, clock in enumerate((4, 4, 4, 4, 8)):
        journal.clock = clock
        journal.admit(i, prefill=1)
        journal.token(i, 7)
        journal.end(i)
    served = journal.served()
    assert [served.first_token(percent) for percent in (1, 20, 21, 50, 80, 81, 99, 100)] == [1, 1, 2, 3, 4, 9, 9, 9]
