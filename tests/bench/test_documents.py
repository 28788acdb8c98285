"""Documents of arenas. Oracle: the files, by hand."""

import importlib
import json

import msgspec
import pytest

from refimpl.bench.documents import document, stem, store, summary
from refimpl.bench.runner import Row

HERE, THERE = {"commit": "one", "device": "cpu"}, {"commit": "two", "device": "cpu"}


def row(method="Good", seed=0, score=1.0, **rest):
    rest = {"environment": HERE, "axes": {"task": "sum"}, **rest}
    return Row(arena="toy", method=method, settings={}, seed=seed, figures={"score": score}, node="host", pid=3, **rest)


def read(path):
    return json.loads(path.read_text())


def test_a_document_says_what_was_measured_and_where(toys):
    found = document("toy", [row("nothing"), row(seed=2), row(seed=1, environment=THERE), row("x")])
    assert {name: found[name] for name in ("arena", "about", "version", "baseline", "seeds", "environment")} == {
        "arena": "toy", "about": "Toys, by points.", "version": 1, "baseline": "nothing", "seeds": [0, 1, 2], "environment": HERE,
    }  # fmt: skip
    assert found["metrics"][0] == {"name": "score", "unit": "points", "better": "higher", "exact": True}
    assert found["axes"] == {"task": ["sum", "count"], "length": [1, 2, 4]}
    assert "quick" not in found and "model" not in found
    assert [r.get("environment") for r in found["rows"]] == [None, None, THERE, None]
    assert found["rows"][0] == {
        "arena": "toy", "method": "nothing", "settings": {}, "axes": {"task": "sum"}, "seed": 0, "figures": {"score": 1.0},
    }  # fmt: skip
    msgspec.convert(found["rows"], list[Row])


def test_a_machines_names_are_not_in_it(toys):
    """Hosts and processes stay in the store: documents are committed."""
    assert "host" not in json.dumps(document("toy", [row()]))


def test_rows_of_other_arenas_are_left_out(toys):
    other = msgspec.structs.replace(row(), arena="weights")
    assert len(document("toy", [row(), other])["rows"]) == 1


def test_the_file_is_named_for_arena_and_model(toys, tmp_path):
    assert stem(document("toy", [row()])) == "toy"
    found = document("toy", [row()], model=str(tmp_path / "Qwen2-0.5B"))
    assert (found["model"], stem(found)) == ("Qwen2-0.5B", "toy-on-qwen2-0.5b")
    assert store(found, tmp_path).name == "toy-on-qwen2-0.5b.json"


def test_texts_of_the_users_are_named_and_bring_their_axes(toys, tmp_path, monkeypatch):
    arena = importlib.import_module("refimpl.arena.toy")
    monkeypatch.setattr(arena, "axes_of", lambda folder: {"task": ("essay",)}, raising=False)
    found = document("toy", [row()], model="/m/Qwen2", texts=str(tmp_path / "LongBench"))
    assert (found["texts"], found["axes"], stem(found)) == (
        "LongBench",
        {"task": ["essay"]},
        "toy-on-qwen2-of-longbench",
    )


def test_rows_of_methods_that_did_not_run_are_kept_with_their_environment(toys, tmp_path):
    store(document("toy", [row("nothing"), row("a"), row("b"), row("b", seed=7)]), tmp_path)
    again = [row("nothing", environment=THERE, score=5.0), row("b", environment=THERE), row("0", environment=THERE)]
    path = store(document("toy", again), tmp_path)
    found = read(path)
    assert [(r["method"], r["seed"], r.get("environment")) for r in found["rows"]] == [
        ("nothing", 0, None), ("0", 0, None), ("a", 0, HERE), ("b", 0, None),
    ]  # fmt: skip
    assert found["environment"] == THERE
    assert found["rows"][0]["figures"] == {"score": 5.0}
    assert found["seeds"] == [0]


def test_a_row_of_an_earlier_version_says_so(toys, tmp_path, monkeypatch):
    from refimpl.bench.cells import open_arena

    store(document("toy", [row("nothing"), row("a")]), tmp_path)
    monkeypatch.setattr(open_arena("toy"), "VERSION", 2)
    found = read(store(document("toy", [row("nothing")]), tmp_path))
    assert [(r["method"], r.get("version")) for r in found["rows"]] == [("nothing", None), ("a", 1)]


def test_the_quick_form_never_takes_the_place_of_the_full_one(toys, tmp_path):
    full = document("toy", [row("nothing"), row("a")])
    quick = document("toy", [row("nothing", quick=True), row("a", quick=True), row("b", quick=True)])
    assert quick["quick"] is True
    path = store(full, tmp_path)
    before = path.read_bytes()
    assert store(quick, tmp_path) is None
    assert path.read_bytes() == before


def test_the_full_form_takes_the_place_of_the_quick_one_as_a_whole(toys, tmp_path):
    """Figures of both forms in one table could not be compared."""
    quick = document("toy", [row("nothing", quick=True), row("a", quick=True), row("b", quick=True)])
    assert store(quick, tmp_path) is not None
    more = document("toy", [row("nothing", quick=True), row("c", quick=True)])
    assert [r["method"] for r in read(store(more, tmp_path))["rows"]] == ["nothing", "a", "b", "c"]
    found = read(store(document("toy", [row("nothing"), row("a")]), tmp_path))
    assert [r["method"] for r in found["rows"]] == ["nothing", "a"] and "quick" not in found


def test_a_broken_document_is_not_written_over(toys, tmp_path):
    (tmp_path / "toy.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and run again"):
        store(document("toy", [row()]), tmp_path)
    assert (tmp_path / "toy.json").read_text() == "{"


def test_means_and_spread_over_seeds(toys):
    """Oracle: by hand. 1, 2 and 6 have the mean 3 and half of the range is 2.5; points of the axes stand apart."""
    rows = [row(seed=s, score=v) for s, v in ((0, 1.0), (1, 2.0), (2, 6.0))]
    rows += [row(seed=0, score=9.0, axes={"task": "count"}), row(seed=1, axes={"task": "count"}, error="E: no")]
    rows[-1].figures = {}
    found = summary(document("toy", rows)["rows"])
    assert found == [
        {"method": "Good", "settings": {}, "axes": {"task": "sum"}, "seeds": [0, 1, 2], "mean": {"score": 3.0},
         "spread": {"score": 2.5}, "failed": 0},
        {"method": "Good", "settings": {}, "axes": {"task": "count"}, "seeds": [0], "mean": {"score": 9.0},
         "spread": {"score": 0.0}, "failed": 1},
    ]  # fmt: skip
    [failed] = summary([{**document("toy", [rows[-1]])["rows"][0]}])
    assert (failed["mean"], failed["seeds"], failed["failed"]) == ({}, [], 1)
