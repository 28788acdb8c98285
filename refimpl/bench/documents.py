"""What a run leaves: a document an arena, with its metrics, the environment, the seeds and a row for each cell."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from refimpl.bench.cells import axes_of, open_arena
from refimpl.bench.runner import Row
from refimpl.results import kept_rows, read
from refimpl.views import PLACES, group_rows


def document(arena: str, rows: Sequence[Row], model: str | None = None, texts: str | None = None) -> dict[str, Any]:
    """An arena's document; its environment is the one most rows were measured in, and a row of another carries its own.

    Args:
        arena: its name; rows of others are left out.
        rows: finished cells, of one form, quick or full.
        model: folder of the model that took the testbed's place.
        texts: folder of the texts that took the arena's place.
    """
    module = open_arena(arena)
    mine = [row for row in rows if row.arena == arena]
    stamps = [json.dumps(row.environment) for row in mine if row.environment]
    stamp = json.loads(Counter(stamps).most_common(1)[0][0]) if stamps else {}
    found: dict[str, Any] = {
        "arena": arena,
        "about": module.ABOUT,
        "version": module.VERSION,
        "baseline": module.BASELINE,
        "metrics": [metric._asdict() for metric in module.METRICS],
        "axes": {name: list(values) for name, values in axes_of(module, texts).items()},
    }
    for name, folder in (("model", model), ("texts", texts)):
        if folder is not None:
            found[name] = Path(folder).resolve().name
    if any(row.quick for row in mine):
        found["quick"] = True
    found["seeds"] = sorted({row.seed for row in mine})
    found["environment"] = stamp
    found["rows"] = [_plain(row, stamp) for row in mine]
    return found


def _plain(row: Row, stamp: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(row)
    for name in ("node", "pid", "quick"):  # of a machine's inside; of the document as a whole
        plain.pop(name, None)
    if row.environment == stamp:
        plain.pop("environment", None)
    return plain


def stem(document: dict[str, Any]) -> str:
    """Name of a document's file: the arena's, with the model where that is not the testbed, and the texts where they are the user's."""
    parts = [document["arena"], *(f"{word}-{document[name].lower()}" for word, name in PLACES if name in document)]
    return "-".join(parts)


def store(fresh: dict[str, Any], folder: Path) -> Path | None:
    """Write a document as `<arena>.json`; rows of methods that did not run are kept, each with its environment and the
    arena's version where they are others.

    A file holds one form. The full form takes the quick one's place; the quick form never takes the full one's, and then
    nothing is written.
    """
    path = folder / f"{stem(fresh)}.json"
    before = read(path) if path.exists() else {}
    quick, was_quick = bool(fresh.get("quick")), bool(before.get("quick"))
    if before and quick and not was_quick:
        return None
    kept = []
    if quick == was_quick:
        kept = kept_rows(path, "rows", {row["method"] for row in fresh["rows"]}, fresh["environment"])
        if before.get("version", 1) != fresh["version"]:
            kept = [{"version": before.get("version", 1)} | row for row in kept]
    rows = sorted(kept + fresh["rows"], key=lambda row: (row["method"] != fresh["baseline"], row["method"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**fresh, "seeds": sorted({row["seed"] for row in rows}), "rows": rows}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread, half of the range, over the seeds of each method, setting and point of the axes."""
    found = []
    for group in group_rows(rows):
        finished = [row for row in group if not row.get("error")]
        values = {
            name: [row["figures"][name] for row in finished] for name in (finished[0]["figures"] if finished else ())
        }
        found.append(
            {
                "method": group[0]["method"],
                "settings": group[0]["settings"],
                "axes": group[0].get("axes", {}),
                "seeds": sorted(row["seed"] for row in finished),
                "mean": {name: sum(v) / len(v) for name, v in values.items()},
                "spread": {name: (max(v) - min(v)) / 2 for name, v in values.items()},
                "failed": len(group) - len(finished),
            }
        )
    return found
