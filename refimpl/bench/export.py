"""Documents written for others: as JSON, as CSV with a line a cell, or as a page of interactive plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refimpl.bench.documents import summary
from refimpl.plots import page
from refimpl.results import csv_text

SUFFIXES = (".json", ".csv", ".html")


def check_export(path: Path) -> None:
    """That a file can be exported to, before anything is computed for it.

    Raises:
        ValueError: its suffix names no format, or its folder is not there.
        ModuleNotFoundError: the plots' library is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--export {str(path)!r} must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--export {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.suffix == ".html":
        import plotly  # noqa: F401  # only whether it is there


def with_summary(document: dict[str, Any]) -> dict[str, Any]:
    """A document with the mean and the spread over seeds of each group of rows."""
    return {**document, "summary": summary(document["rows"])}


def export(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Write documents to a file, in the format of its suffix."""
    if path.suffix == ".json":
        whole = [with_summary(document) for document in documents]
        text = json.dumps(whole[0] if len(whole) == 1 else whole, indent=1) + "\n"
    elif path.suffix == ".csv":
        text = csv_text(*documents)
    else:
        from plotly.offline import get_plotlyjs

        text = page(documents, get_plotlyjs())
    path.write_text(text, encoding="utf-8")
