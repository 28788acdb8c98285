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
    assert views.mean_text([row("a", 0)], "seconds") == "–"


def test_rows_that_differ_in_the_seed_alone_stand_together():
    """Oracle: by hand. In the order of their first; settings tell apart, whatever their kind."""
    rows = [row("a", 0, bits=2), row("b", 0), row("a", 1, bits=2), row("a", 0, bits=4), row("b", 1)]
    groups = [[(r["method"], r["settings"].get("bits"), r["seed"]) for r in g] for g in views.group_rows(rows)]
    assert groups == [[("a", 2, 0), ("a", 2, 1)], [("b", None, 0), ("b", None, 1)], [("a", 4, 0)]]


def test_settings_in_words():
    """Oracle: by hand."""
    assert views.settings_text(row("a", 0, group_size=32, target=["*q", "*v"])) == "group size 32, target *q *v"


def test_figures_leave_out_rivals_that_were_not_asked_for_and_name_failures():
    document = {
        "baseline": "none",
        "metrics": [{"name": "bytes"}],
        "rows": [row("none", 0), row("a", 0, bits=2), row("b", 0, bits=3), row("a", 0, error="ValueError: no", bits=9)],
    }
    lines = text(views.figures_view(document, {"a"})).splitlines()
    assert [line.split() for line in lines] == [
        ["method", "bits", "bytes"],
        ["none", "10"],
        ["a", "2", "10"],
        ["a", "9", "failed"],
    ]


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
