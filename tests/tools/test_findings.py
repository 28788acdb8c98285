"""Findings of the published benchmark, held against figures. Oracle: by hand, on a few made-up rows."""

import pytest

from tools import findings
from tools.findings import Missing, Scores


def row(method, task, score, *, prefill="whole", seed=0, error=None, **settings):
    axes = {"task": task, "question": "seen", "prefill": prefill}
    return {
        "method": method, "settings": settings, "axes": axes, "seed": seed, "error": error,
        "figures": {} if error else {"score": score},
    }  # fmt: skip


def answer(rows, says):
    (found,) = [a for a in findings.answers({"rows": rows}) if says in a.finding.says]
    return found


def test_shares_are_of_the_uncompressed_score_read_in_the_same_way():
    """Oracle: by hand: the mean of two seeds over what the full cache scores, whole or in chunks."""
    rows = [
        row("full cache", "needle", 0.8),
        row("full cache", "needle", 0.4, prefill="chunks"),
        row("h2o", "needle", 0.2, compression=4),
        row("h2o", "needle", 0.6, compression=4, seed=1),
        row("h2o", "needle", 0.9, compression=2),
        row("h2o", "needle", 0.3, compression=4, prefill="chunks"),
        row("tova", "needle", 0, compression=4, error="E: no"),
    ]
    scores = Scores(rows)
    assert scores.score("h2o", "needle", compression=4) == 0.4
    assert scores.share("h2o", "needle", compression=4) == 0.5
    assert scores.share(["h2o", "tova"], "needle", compression=4, prefill="chunks") == pytest.approx(0.75)
    with pytest.raises(Missing, match=r"tova .* on needle"):
        scores.share("tova", "needle", compression=4)


def test_the_published_rows_hold_what_the_paper_found():
    """Oracle: by hand from the published scores: Griffin 9.0 of 67.0 in retrieval, Mamba and RWKV 1.2 and 4.0."""
    told = {a.finding.says: a.published for a in findings.answers({"rows": []})}
    assert all(order.holds for order in told.values() if order)
    assert sum(order is None for order in told.values()) == 1  # the hybrid's needle was not published
    (found,) = [order for says, order in told.items() if "retrieval; some attention" in says]
    assert found == (pytest.approx(9.0 / 67.0), pytest.approx((1.2 + 4.0) / 2 / 67.0))


def test_what_was_not_measured_has_no_answer_and_what_was_has_one():
    assert all(a.here is None for a in findings.answers({"rows": []}))
    rows = [row("full cache", task, 1.0) for task in ("needle", "needle_64")]
    rows += [row("h2o", "needle", 0.9, compression=4), row("h2o", "needle_64", 0.5, compression=4)]
    assert answer(rows, "Short answers").here == (0.9, 0.5)
    rows[-1] = row("h2o", "needle_64", 0.95, compression=4)
    assert not answer(rows, "Short answers").here.holds


def test_reading_whole_is_held_against_chunks_by_the_same_methods():
    """Oracle: by hand: TOVA, which failed in chunks, has no part on either side."""
    rows = [row("full cache", task, 1.0, prefill=way) for task in findings.TASKS for way in ("whole", "chunks")]
    for way, h2o, tova in (("whole", 0.6, 0.1), ("chunks", 0.5, 0.0)):
        rows += [row("h2o", task, h2o, prefill=way, compression=4) for task in findings.TASKS]
        error = "E: no" if way == "chunks" else None
        rows += [row("tova", task, tova, prefill=way, error=error, compression=4) for task in findings.TASKS]
    assert answer(rows, "A prompt that is read uncompressed").here == (pytest.approx(0.6), pytest.approx(0.5))


def test_the_worst_task_of_the_best_method_counts():
    """Oracle: by hand: KIVI's worst is 0.8; of those that drop, H2O's worst is 0.7 and StreamingLLM's 0.1."""
    rows = [row("full cache", task, 1.0) for task in findings.TASKS]
    for method, worst, settings in (
        ("kivi", 0.8, {"bits": 4}),
        ("h2o", 0.7, {"compression": 4}),
        ("streaming-llm", 0.1, {"compression": 4}),
    ):
        rows += [row(method, task, worst if task == "retrieval" else 0.9, **settings) for task in findings.TASKS]
    assert answer(rows, "Quantization keeps every task").here == (0.8, 0.7)


def test_published_and_measured_stand_side_by_side():
    """Oracle: by hand: KIVI at 4 bits kept 66.5 of 67.0 in retrieval there, and half here."""
    rows = [row("full cache", "retrieval", 0.8), row("kivi", "retrieval", 0.4, bits=4)]
    first = findings.side_by_side({"rows": rows})[0]
    at = findings.read()["tasks"].index("retrieval")
    assert (first.method, first.settings) == ("kivi", {"bits": 4})
    assert (first.published[at], first.here[at]) == (pytest.approx(66.5 / 67.0), 0.5)
    assert [v for i, v in enumerate(first.here) if i != at] == [None] * 5
