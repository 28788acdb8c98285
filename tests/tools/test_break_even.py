"""Below which bandwidth a smaller cache pays. Oracle: by hand, on made-up rows."""

import pytest

from refimpl import results
from tools.break_even import Row, break_even

METRICS = [{"name": "price"}, {"name": "read_seconds"}]


def row(method, price, *, seed=0, read=0.1, tokens=8, **settings):
    figures = {} if price is None else {"price": price, "read_seconds": read}
    return {
        "method": method, "settings": settings, "axes": {"tokens": tokens}, "seed": seed, "figures": figures,
        "error": "E: no" if price is None else None,
    }  # fmt: skip


def found(rows, metrics=METRICS):
    return break_even({"metrics": metrics, "baseline": "full cache", "rows": rows})


def test_bytes_saved_over_seconds_added_by_hand():
    """Oracle: by hand: a step takes 3 s and 5 s longer for 2 GB less, 4 s in the mean: over a link of 0.5 GB a second the 2 GB take 4 s.
    Reading a GB takes 0.1 s and 0.3 s: 5 GB a second.
    """
    shown = found([row("kivi", 3 / 2, bits=2), row("kivi", 5 / 2, seed=1, read=0.3, bits=2)])
    assert shown.rows == [Row("kivi", "bits 2", ["0.5"])] and shown.memory == "5" and shown.points == ["tokens 8"]


def test_who_is_faster_pays_anywhere_and_who_saves_nothing_nowhere():
    shown = found([row("full cache", 0.0), row("streaming-llm", -0.2), row("quest", 0.0)])
    assert shown.rows == [Row("streaming-llm", "", ["any"]), Row("quest", "", ["–"])]


def test_each_point_has_its_column_and_what_failed_has_none():
    """Oracle: by hand: a price of 3 s/GB is 0.33 GB/s; of 40, 0.025."""
    rows = [row("a", 3.0, bits=4), row("a", 40.0, tokens=32, bits=4), row("b", None), row("b", 0.5, tokens=32)]
    shown = found(rows)
    assert shown.points == ["tokens 8", "tokens 32"]
    assert shown.rows == [Row("a", "bits 4", ["0.33", "0.025"]), Row("b", "", ["", "2"])]


@pytest.mark.parametrize("metrics", [[], METRICS[:1], METRICS[1:]])
def test_other_arenas_have_none(metrics):
    assert found([row("a", 1.0)], metrics) is None


def test_without_a_method_there_is_nothing_to_show():
    assert found([]) is None and found([row("full cache", 0.0), row("a", None)]) is None


def test_what_is_committed_can_be_shown():
    """Oracle: bytes and seconds of the committed rows, by another way than their price: what is saved over what a step takes longer than a
    step of the uncompressed cache in the same process.
    """
    document = results.read(results.committed_folder() / "kv_speed.json")
    shown = break_even(document)
    rows = [r for r in document["rows"] if r["method"] == "kivi" and r["settings"]["bits"] == 2]
    whole = {r["axes"]["tokens"]: r["figures"]["bytes"] for r in document["rows"] if r["method"] == "full cache"}
    expected = []
    for tokens, full in whole.items():
        these = [r["figures"] for r in rows if r["axes"]["tokens"] == tokens]
        added = sum(f["seconds_per_token"] * (1 - 1 / f["slowdown"]) for f in these) / len(these)
        expected.append(f"{(full - these[0]['bytes']) / added / 1e9:.2g}")
    [cells] = [r.cells for r in shown.rows if (r.method, r.settings) == ("kivi", "bits 2")]
    assert cells == expected
