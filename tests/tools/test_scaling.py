"""Oracles: the reader, for what is written; the closed form c·n^k, for the fit. Nothing here looks at a clock."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

import taxonomy
from tools import scaling


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Compiled forms go into a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("methods", [1, 49, 50, 51, 120])
def test_what_is_synthesized_is_valid_and_of_the_size_asked_for(tmp_path, methods):
    root = tmp_path / "taxonomy"
    scaling.synthesize(root, methods)
    assert taxonomy.validate(root) == []
    tree = taxonomy.load(root)
    assert (len(tree.methods), len(tree.papers)) == (methods, methods)
    assert len(tree.categories) == -(-methods // scaling.IN_CATEGORY)
    assert sum(len(m.relations.builds_on) for m in tree.methods.values()) == methods - 1
    assert len({m.idea for m in tree.methods.values()}) == methods  # no two alike, as in a real tree


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("c", [1e-9, 1.0, 250.0])
def test_exponent_of_a_power_law(k, c):
    """Oracle: the law itself."""
    sizes = [10, 33, 100, 5000]
    assert scaling.exponent(sizes, [c * n**k for n in sizes]) == pytest.approx(k, abs=1e-9)


def test_exponent_is_the_least_squares_slope():
    """Oracle: by hand, in powers of ten: points (0, 0), (1, 2), (2, 1) have slope 1/2."""
    assert scaling.exponent([1, 10, 100], [1, 100, 10]) == pytest.approx(0.5)


def test_every_step_is_timed_and_nothing_is_left(cache):
    seconds = scaling.time_steps(60)
    assert list(seconds) == ["validate", "load, first", "load, compiled", "graph", "find"]
    assert all(value > 0 for value in seconds.values())
    assert list(cache.rglob("*.taxonomy")) == []


@pytest.fixture
def command(monkeypatch):
    app = Typer()
    app.command()(scaling.main)
    monkeypatch.setattr(scaling, "SIZES", (10, 30, 90))
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_table_and_file(command, tmp_path):
    done = command("--largest", 40, "--output", tmp_path / "scaling.json")
    assert done.exit_code == 0
    assert "exponent" in done.output
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert set(document["seconds"]) == {"10", "30"}
    assert document["exponent"].keys() == document["seconds"]["10"].keys()
    assert "commit" in document["environment"]


@pytest.mark.parametrize("largest", [0, 10, 29])
def test_one_size_has_no_exponent(command, largest):
    done = command("--largest", largest)
    assert done.exit_code == 2
    assert "--largest must be at least 30" in done.output
