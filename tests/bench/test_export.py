"""Exports, read back by other people's parsers."""

import csv
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from refimpl.bench.documents import document
from refimpl.bench.export import check_export, export, with_summary
from refimpl.bench.runner import Row


def rows(arena="toy", metric="score"):
    return [
        Row(
            arena=arena,
            method=method,
            settings={"target": ["*q", 'a "b", c']} if method == "Good" else {},
            axes={"task": task, "length": 1} if arena == "toy" else {},
            seed=seed,
            figures={} if method == "Bad" else {metric: 0.1 + seed, "cost": 8} if arena == "toy" else {"bytes": 3},
            error="E: <no>" if method == "Bad" else None,
            environment={"commit": "one", "device": "cpu"},
        )
        for method in ("nothing", "Good", "Bad")
        for task in ("sum", "count")
        for seed in (0, 1)
    ]


@pytest.fixture
def found(toys):
    return document("toy", rows())


def test_json_is_the_document_with_its_summary(found, tmp_path):
    export([found], tmp_path / "x.json")
    read = json.loads((tmp_path / "x.json").read_text())
    assert read == json.loads(json.dumps(with_summary(found)))
    assert {name: read[name] for name in found} == json.loads(json.dumps(found))
    assert [line["spread"] for line in read["summary"][:2]] == [{"score": 0.5, "cost": 0.0}] * 2
    export([found, found], tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())) == 2


def test_csv_has_a_line_a_cell(found, tmp_path):
    """Oracle: the csv module's reader; figures come back as the numbers they were."""
    export([found], tmp_path / "x.csv")
    lines = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len(lines) == 12
    assert list(lines[0]) == ["arena", "method", "settings", "task", "length", "seed", "score", "cost", "error"]
    for line, row in zip(lines, found["rows"], strict=True):
        assert json.loads(line["settings"]) == row["settings"]
        assert (line["method"], line["task"], int(line["seed"])) == (row["method"], row["axes"]["task"], row["seed"])
        assert (float(line["score"]) if line["score"] else None) == row["figures"].get("score")
    assert lines[-1]["error"] == "E: <no>"


def test_csv_of_several_arenas_has_all_their_columns(found, tmp_path):
    export([found, document("weights", rows("weights"))], tmp_path / "x.csv")
    lines = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len(lines) == 24
    assert {line["bytes"] for line in lines[:12]} == {""} and {line["task"] for line in lines[12:]} == {""}


def test_html_holds_everything_it_needs(found, tmp_path):
    """Oracle: an HTML parser. No address is loaded; each plot's data is JSON."""
    export([found], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()

    class Reader(HTMLParser):
        figures, loaded = [], []

        def handle_starttag(self, tag, attributes):
            named = dict(attributes)
            self.loaded += [named[name] for name in ("src", "href") if name in named]
            if "data-figure" in named:
                self.figures.append(json.loads(named["data-figure"]))

    reader = Reader()
    reader.feed(text)
    assert reader.loaded == []
    assert [figure["title"] for figure in reader.figures] == ["score against cost"]
    assert {trace["name"] for trace in reader.figures[0]["data"]} == {"nothing", "Good"}
    assert "plotly.js v" in text and "commit one" in text
    assert re.search(r"Plotly\.newPlot\(element", text)


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.txt", r"must end in \.json, \.csv, \.html"), ("x", "must end in"), ("nowhere/x.csv", "there is no folder")],
)
def test_an_export_that_could_not_be_written_is_refused_before(tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        check_export(tmp_path / name)


def test_plots_need_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    check_export(tmp_path / "x.csv")
    with pytest.raises(ModuleNotFoundError):
        check_export(tmp_path / "x.html")
