"""Stored documents: which folder's is shown, what is kept. Oracle: the files, by hand."""

import importlib.util
import json

import pytest

from refimpl import results
from refimpl.claims import Measured


def row(method, claim, value=1.0, holds=True):
    return {"method": method, "claim": claim, "value": value, "holds": holds}


def put(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_the_last_folder_that_has_a_document_wins(tmp_path):
    one, two, missing = tmp_path / "one", tmp_path / "two", tmp_path / "missing"
    put(one / "weights.json", {"rows": [1]})
    put(one / "claims.json", {"claims": []})
    put(two / "weights.json", {"rows": [2]})
    put(two / "notes.txt", {})
    assert results.documents([one, two]) == {"weights": {"rows": [2]}, "claims": {"claims": []}}
    assert results.documents([two, one, missing])["weights"] == {"rows": [1]}
    assert results.documents([missing]) == {}


def test_committed_results_stand_below_those_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    assert results.committed_folder() == tmp_path / "docs/results"
    assert results.fresh_folder() == tmp_path / "build/results"
    put(results.committed_folder() / "weights.json", {"rows": ["committed"]})
    assert results.documents() == {"weights": {"rows": ["committed"]}}
    put(results.fresh_folder() / "weights.json", {"rows": ["fresh"]})
    assert results.documents() == {"weights": {"rows": ["fresh"]}}


def test_outside_of_a_checkout_figures_go_to_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(results, "CHECKOUT", tmp_path / "site-packages")
    assert results.fresh_folder() == tmp_path / "here/build/results"


@pytest.mark.parametrize("text", ["", '{"rows": [', "\x00", "[1, 2]", "7"])
def test_a_document_that_is_not_whole_is_named_with_what_to_do(tmp_path, text):
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(ValueError, match=r"weights\.json .*; delete it and run again"):
        results.documents([tmp_path])


def test_claims_by_method_and_name(tmp_path):
    put(tmp_path / "claims.json", {"claims": [row("a", "x", 1.5), row("a", "y", 2.0, False)]})
    assert results.claims([tmp_path]) == {("a", "x"): row("a", "x", 1.5), ("a", "y"): row("a", "y", 2.0, False)}
    assert results.claims([tmp_path / "missing"]) == {}


def test_storing_replaces_a_method_and_keeps_the_others(tmp_path):
    """All rows of a method that ran are replaced, those of claims it no longer has too; sorted, with the environment."""
    path = tmp_path / "deep/claims.json"
    results.store_claims(path, [Measured(method="b", claim="x", value=1.0, holds=True)])
    results.store_claims(path, [Measured(method="a", claim=c, value=2.0, holds=False) for c in "zy"])
    assert list(results.claims([path.parent])) == [("a", "y"), ("a", "z"), ("b", "x")]
    results.store_claims(path, [Measured(method="a", claim="y", value=3.0, holds=True)])
    assert results.claims([path.parent]) == {("a", "y"): row("a", "y", 3.0), ("b", "x"): row("b", "x", 1.0)}
    assert json.loads(path.read_text())["environment"].keys() >= {"commit", "dirty", "torch", "device"}
    results.store_claims(path, [])
    assert len(results.claims([path.parent])) == 2


def test_storing_over_a_broken_document_is_refused(tmp_path):
    (tmp_path / "claims.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and run again"):
        results.store_claims(tmp_path / "claims.json", [])
    assert (tmp_path / "claims.json").read_text() == "{"


def test_what_is_committed_can_be_read():
    """Each has its environment, and rows or claims of methods that exist, or of a plugin that comes with the tools."""
    import taxonomy

    methods = taxonomy.load().methods
    for name, document in results.documents([results.committed_folder()]).items():
        assert {"commit", "dirty", "torch", "device"} <= document["environment"].keys(), name
        if name == "scaling":  # of synthetic trees, not of methods
            assert all(0.8 < slope < 1.3 for slope in document["exponent"].values())
            continue
        rows = document.get("rows") or document.get("claims") or document.get("peers")
        assert rows, name
        unknown = {r["method"] for r in rows} - {*methods, document.get("baseline")}
        assert all(importlib.util.find_spec(plugin.partition(":")[0]) for plugin in unknown), name


def test_what_was_measured_elsewhere_keeps_its_own_environment(tmp_path, monkeypatch):
    """Oracle: by hand. The row that is kept says on which commit it was measured; a second run does not change that."""
    from refimpl import environment

    path = tmp_path / "claims.json"
    for commit, method in (("one", "a"), ("two", "b"), ("three", "c")):
        monkeypatch.setattr(environment, "environment", lambda commit=commit: {"commit": commit})
        results.store_claims(path, [{"method": method, "claim": "x", "value": 1.0, "holds": True}])
    document = json.loads(path.read_text())
    assert document["environment"] == {"commit": "three"}
    own = {row["method"]: row.get("environment", {}).get("commit") for row in document["claims"]}
    assert own == {"a": "one", "b": "two", "c": None}
