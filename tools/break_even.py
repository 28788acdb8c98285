"""Below which bandwidth a smaller cache pays: bytes saved over seconds added, from an arena's figures.

A document can say it where its metrics have `price`, the seconds that a step takes longer for each GB that it holds less than the
baseline, and `read_seconds`, what reading a GB takes on the machine. A cache that comes over a link of so many GB a second is there
sooner by what it holds less over that, and the step takes longer by its price: one over the price is where they are equal.
"""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from refimpl.views import group_rows, mean, settings_text, words

PRICE, PER_GB = "price", "read_seconds"
ANY, NEVER = "any", "–"


class Row(NamedTuple):
    """A method with one configuration: a cell for each point of the axes."""

    method: str
    settings: str
    cells: list[str]


class BreakEven(NamedTuple):
    """What the page shows.

    Attributes:
        memory: GB a second of the machine's memory.
        points: of the arena's axes, in words.
        rows: the baseline has none.
    """

    memory: str
    points: list[str]
    rows: list[Row]


def break_even(document: Mapping[str, Any]) -> BreakEven | None:
    """The bandwidths of a document's methods, means over its seeds; None if it has no prices.

    Examples:
        >>> metrics = [{"name": "price"}, {"name": "read_seconds"}]
        >>> figures = {"price": 2.0, "read_seconds": 0.1}
        >>> row = {"method": "rtn", "settings": {"bits": 4}, "axes": {"tokens": 8}, "seed": 0, "figures": figures}
        >>> break_even({"metrics": metrics, "baseline": "full", "rows": [row]})
        BreakEven(memory='10', points=['tokens 8'], rows=[Row(method='rtn', settings='bits 4', cells=['0.5'])])
    """
    if not {PRICE, PER_GB} <= {metric["name"] for metric in document["metrics"]}:
        return None
    measured = [row for row in document["rows"] if {PRICE, PER_GB} <= row["figures"].keys()]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for group in group_rows(row for row in measured if row["method"] != document["baseline"]):
        first = group[0]
        found.setdefault((first["method"], settings_text(first)), {})[_point(first)] = _below(mean(group, PRICE))
    if not found:
        return None
    points = list(dict.fromkeys(point for cells in found.values() for point in cells))
    rows = [Row(*name, [cells.get(point, "") for point in points]) for name, cells in found.items()]
    return BreakEven(f"{1 / statistics.fmean(row['figures'][PER_GB] for row in measured):.3g}", points, rows)


def _below(price: float | None) -> str:
    """GB a second; a step that takes no longer pays at any, and one that holds no less has price 0 and pays at none."""
    if not price:
        return NEVER
    return ANY if price < 0 else f"{1 / price:.2g}"


def _point(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{words(name)} {value}" for name, value in row.get("axes", {}).items())
