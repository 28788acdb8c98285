"""Cells, rows, failures, storage."""

import json

import msgspec
import pytest

import taxonomy
from refimpl.arena import runner


@pytest.fixture
def rtn():
    return taxonomy.load().methods["rtn"]


def with_arena(method, grid):
    return msgspec.structs.replace(method, arena=grid)


def test_cells_are_the_product_of_the_settings_after_the_baseline(rtn):
    """Oracle: by hand. 2 bits x 2 sizes x 2 seeds, and the baseline once a seed."""
    found = runner.cells([with_arena(rtn, {"weights": {"bits": [2, 4], "group_size": [8, 16]}})], seeds=(0, 1))
    assert [c.method for c in found[:2]] == [None, None]
    assert len(found) == 2 + 8
    assert found[2].settings == {"bits": 2, "group_size": 8}


def test_rows_repeat_from_their_seed(rtn):
    """Oracle: the same cell again. Negative control: another seed gives other figures."""
    cell = runner.Cell(arena="weights", method=rtn, settings={"bits": 3}, seed=5)
    exact = [metric.name for metric in runner.open_arena("weights").METRICS if metric.exact]
    first, again = runner.run_cell(cell), runner.run_cell(cell)
    other = runner.run_cell(msgspec.structs.replace(cell, seed=6))
    assert {name: first.figures[name] for name in exact} == {name: again.figures[name] for name in exact}
    assert first.figures["output_error"] != other.figures["output_error"]


def test_a_failing_cell_is_a_row_and_the_run_goes_on(rtn):
    cells = [runner.Cell(arena="weights", method=rtn, settings={"bits": bits}, seed=0) for bits in (77, 4)]
    seen = []
    rows = runner.run(cells, done=seen.append)
    assert rows[0].error == "ValueError: bits=77 must be 1 to 8"
    assert rows[0].figures == {}
    assert rows[1].error is None
    assert seen == rows


def test_stored_rows_carry_the_environment_and_keep_other_methods(rtn, tmp_path):
    rows = runner.run(runner.cells([with_arena(rtn, {"weights": {"bits": [4]}})]))
    other = [msgspec.structs.replace(row, method="another") if row.method == "rtn" else row for row in rows]
    runner.store(other, tmp_path)
    [path] = runner.store(rows, tmp_path)
    document = json.loads(path.read_text())
    assert [row["method"] for row in document["rows"]] == ["16 bit", "another", "rtn"]
    assert {"commit", "dirty", "torch", "device", "threads"} <= document["environment"].keys()
    assert document["metrics"][0] == {
        "name": "output_error",
        "unit": "share of ‖XWᵀ‖",
        "better": "lower",
        "exact": True,
    }


@pytest.mark.parametrize("name", ["nowhere", "runner", "../weights", ""])
def test_an_unknown_arena_is_named(name):
    with pytest.raises(ValueError, match="unknown arena"):
        runner.open_arena(name)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"output_error": 1.0}, "are not the arena's"),
        (
            dict.fromkeys(("output_error", "weight_error", "bytes", "compression", "seconds"), float("nan")),
            "output_error is nan",
        ),
    ],
)
def test_figures_that_cannot_be_compared_are_an_error(rtn, monkeypatch, figures, said):
    monkeypatch.setattr(runner.open_arena("weights"), "measure", lambda *args: figures)
    row = runner.run_cell(runner.Cell(arena="weights", method=rtn, settings={}, seed=0))
    assert said in row.error
    assert row.figures == {}
