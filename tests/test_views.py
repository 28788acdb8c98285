"""What the terminal shows, before it is a terminal's: numbers, means, groups of rows, formulas."""

import pytest
from rich.console import Console

import taxonomy
from refimpl import views


def text(renderable, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12800.0, "12,800"),
        (0.03125, "0.03125"),
        (5.2e-6, "5.2e-06"),
        (0, "0"),
        (-3.0, "-3"),
        (123456.7, "123,457"),
        (6784.33, "6,784"),
        (999.96, "1000"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers(value, shown):
    """Oracle: by hand."""
    assert views.number(value) == shown


def row(method, seed, error=None, **settings):
    return {"method": method, "settings": settings, "seed": seed, "figures": {"bytes": 10.0 + 2 * seed}, "error": error}


def test_means_over_seeds_with_half_the_range():
    """Oracle: by hand. 10 and 12: mean 11, half of the range 1; one seed has no spread, an absent figure no mean."""
    assert views.mean_text([row("a", 0), row("a", 1)], "bytes") == "11 ±1"
    assert views.mean_text([row("a", 0)], "bytes") == "10"
    assert views.mean_text([row("a", 0), row("a", 345)], "bytes") == "355 ±300"  # one digit of 345
    assert views.mean_text([row("a", 0)], "seconds") == "–"


def test_rows_that_differ_in_the_seed_alone_stand_together():
    """Oracle: by hand. In the order of their first; settings tell apart, whatever their kind."""
    rows = [row("a", 0, bits=2), row("b", 0), row("a", 1, bits=2), row("a", 0, bits=4), row("b", 1)]
    groups = [[(r["method"], r["settings"].get("bits"), r["seed"]) for r in g] for g in views.group_rows(rows)]
    assert groups == [[("a", 2, 0), ("a", 2, 1)], [("b", None, 0), ("b", None, 1)], [("a", 4, 0)]]
    apart = [{**row("a", 0), "axes": {"task": task}} for task in ("x", "y")]
    assert len(views.group_rows([*apart, row("a", 0)])) == 3


def test_settings_in_words():
    """Oracle: by hand."""
    assert views.settings_text(row("a", 0, group_size=32, target=["*q", "*v"])) == "group size 32, target *q *v"
    assert views.settings_text(row("a", 0, marks=[1, 12, 14, 26, 27])) == "marks 1 12 14 26 …"
    assert (
        views.settings_text(row("a", 0, group_size=None, act_order=False, dense=0))
        == "group size none, act order no, dense 0"
    )


def test_figures_leave_out_rivals_that_were_not_asked_for_and_name_failures():
    document = {
        "baseline": "none",
        "metrics": [{"name": "bytes"}],
        "rows": [row("none", 0), row("a", 0, bits=2), row("b", 0, bits=3), row("a", 0, error="ValueError: no", bits=9)],
    }
    lines = text(views.figures_view(document, {"a"}, 80)).splitlines()
    assert [line.split() for line in lines] == [
        ["method", "settings", "bytes"],
        ["none", "10"],
        ["a", "bits", "2", "10"],
        ["a", "bits", "9", "failed"],
    ]


def measured(method, task, length, seed=0, score=1.0, error=None, **settings):
    return {
        "method": method,
        "settings": settings,
        "axes": {"task": task, "length": length},
        "seed": seed,
        "figures": {} if error else {"score": score, "kept_bytes": 8},
        **({"error": error} if error else {}),
    }


def axes_document(rows):
    metrics = [{"name": "score", "unit": "share"}, {"name": "kept_bytes", "unit": "bytes"}]
    return {"baseline": "none", "metrics": metrics, "axes": {"task": ["sum", "count"], "length": [1, 2]}, "rows": rows}


def test_a_single_point_of_the_axes_is_one_table_that_names_it():
    rows = [
        measured("none", "sum", 2),
        measured("a", "sum", 2, bits=2),
        measured("a", "sum", 2, seed=1, score=3.0, bits=2),
    ]
    [sheet] = views.sheets(axes_document(rows), {"a"})
    assert (sheet.title, sheet.axes, sheet.columns) == ("task sum, length 2", [], ["score", "kept bytes"])
    assert [(row.method, row.settings, row.cells) for row in sheet.rows] == [
        ("none", "", ["1", "8"]), ("a", "bits 2", ["2 ±1", "8"]),
    ]  # fmt: skip


def test_settings_of_numbers_rise_and_others_keep_their_order():
    """Oracle: by hand. Methods keep theirs, too; what is no number comes last."""
    shares = [measured("b", "sum", 1, share=share, whole=w) for share in (0.5, 0.25, "2:4", 0.6) for w in (True, False)]
    rows = [measured("none", "sum", 1), *shares, *(measured("a", "sum", 1, bits=bits) for bits in (4, 2, 16))]
    [sheet] = views.sheets(axes_document(rows), {"a", "b"})
    assert [row.method for row in sheet.rows] == ["none", *"bbbbbbbb", *"aaa"]
    found = [row.settings for row in sheet.rows[1:]]
    assert found[:4] == ["share 0.25, whole yes", "share 0.25, whole no", "share 0.5, whole yes", "share 0.5, whole no"]
    assert found[4:8:2] == ["share 0.6, whole yes", "share 2:4, whole yes"]
    assert found[8:] == ["bits 2", "bits 4", "bits 16"]


def test_the_first_axis_makes_columns_and_the_others_stand_on_the_left():
    """Oracle: by hand. One table a metric; the lines of a length stand together, the baseline first; names have a mean."""
    rows = [
        measured(method, task, length, score=score + length)
        for method, score in (("none", 0.0), ("a", 10.0))
        for task in ("count", "sum")
        for length in (2, 1)
    ]
    rows[0]["figures"]["score"] = 100.0  # none, count, 2
    first, second = views.sheets(axes_document(rows), {"a"})
    assert (first.title, first.axes, first.columns) == ("score (share) by task", ["length"], ["sum", "count", "mean"])
    assert [(row.method, row.axes, row.cells) for row in first.rows] == [
        ("none", ["1"], ["1", "1", "1"]),
        ("a", ["1"], ["11", "11", "11"]),
        ("none", ["2"], ["2", "100", "51"]),
        ("a", ["2"], ["12", "12", "12"]),
    ]
    assert second.title == "kept bytes (bytes) by task"
    lines = text(views.figures_view(axes_document(rows), {"a"}, 80)).splitlines()
    assert "score (share) by task" in lines and ["none", "2", "2", "100", "51"] in [line.split() for line in lines]


@pytest.mark.parametrize(("width", "heads"), [(80, 1), (50, 2), (40, 3)])
def test_figures_that_do_not_fit_stand_in_a_further_table(width, heads):
    """Oracle: by hand. 17 characters of method, 8 of settings and their gaps leave room for three, two and one of 9, 9 and 4."""
    names = ("prompt bytes", "final bytes", "read")
    figures = dict(zip(names, (1_997_568, 3_995_136, 1.5), strict=True))
    rows = [{"method": "selective-context", "settings": {"b": 100}, "seed": 0, "figures": figures, "error": None}]
    document = {"baseline": "none", "metrics": [{"name": name} for name in names], "rows": rows}
    shown = text(views.figures_view(document, {"selective-context"}, width), width)
    assert shown.count("method") == shown.count("selective-context") == heads
    assert all(shown.count(figure) == 1 for figure in ("1,997,568", "3,995,136", "1.5"))


def test_an_axis_of_numbers_has_no_mean_and_what_is_missing_is_a_dash():
    rows = [measured("none", "sum", 1), measured("none", "sum", 2), measured("a", "sum", 2), measured("b", "count", 1)]
    first, _ = views.sheets(axes_document(rows[:3]), {"a"})
    assert first.title == "score (share) by length, task sum"
    assert (first.columns, [row.cells for row in first.rows]) == (["1", "2"], [["1", "1"], ["–", "1"]])
    first, _ = views.sheets(axes_document([measured("none", "sum", 1), measured("b", "count", 1)]), {"b"})
    assert [row.cells for row in first.rows] == [["1", "–", "–"], ["–", "1", "–"]]


def test_what_failed_in_part_is_counted_and_what_failed_whole_says_why():
    rows = [
        measured("a", "sum", 1),
        measured("a", "sum", 1, seed=1, error="E: no"),
        measured("b", "sum", 1, error="E: all"),
    ]
    [sheet] = views.sheets(axes_document(rows), {"a", "b"})
    assert [(row.settings, row.cells, row.error) for row in sheet.rows] == [
        ("1 of 2 failed", ["1", "8"], None), ("", ["–", "–"], "E: all"),
    ]  # fmt: skip


def test_a_row_of_an_earlier_version_and_a_simulation_are_marked():
    rows = [{**measured("a", "sum", 1), "version": 3, "simulated": True}]
    [sheet] = views.sheets(axes_document(rows), {"a"})
    assert (sheet.rows[0].settings, sheet.rows[0].simulated) == ("version 3", True)


def test_arenas_with_how_much_there_is_to_run():
    arena = {"arena": "toy", "about": "[Toys].", "methods": ["a", "b"], "cells": 1234, "quick_cells": 5}
    assert text(views.arenas_view([arena])).splitlines()[1].split() == ["toy", "2", "1,234", "5", "[Toys]."]


def test_every_method_category_and_framework_can_be_shown_narrow():
    """Formulas keep their signs; nothing is wider than the terminal."""
    tree = taxonomy.load()
    shown = {m.id: text(views.method_view(tree, m), 60) for m in list(tree.methods.values())[::7]}
    shown |= {c.id: text(views.category_view(tree, c), 60) for c in list(tree.categories.values())[::9]}
    shown |= {f.id: text(views.framework_view(f), 60) for f in tree.frameworks.values()}
    for name, page in shown.items():
        assert max(map(len, page.splitlines())) <= 60, name
    assert "W_{" in text(views.method_view(tree, tree.methods["rtn"])) or "w_{" in text(
        views.method_view(tree, tree.methods["rtn"])
    )
