"""Stored figures and measured claims: the committed ones, and over them those measured on this machine.

`docs/results/` is committed and written by `effllm bench` and `effllm claims --measure` with `--output`; without that option
they write to `build/results/`, which is not committed, as `effllm run` does. The command line shows this machine's figures where there are any;
the site shows the committed ones, whose seeds and clean tree are known, and this machine's where there are none.
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

CHECKOUT = Path(__file__).parents[1]


def committed_folder() -> Path:
    """Where the results that the site shows are committed."""
    return CHECKOUT / "docs" / "results"


def fresh_folder() -> Path:
    """Where results of this machine go: `build/results/` of a checkout, else of the working directory."""
    base = CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()
    return base / "build" / "results"


def documents(folders: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Every stored document by name (`weights`, `claims`), of the last folder that has it."""
    found = {}
    for folder in folders or (committed_folder(), fresh_folder()):
        for path in sorted(folder.glob("*.json")):
            found[path.stem] = read(path)
    return found


def read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole ({error}); delete it and run again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no results; delete it and run again")
    return document


def for_site() -> dict[str, dict[str, Any]]:
    """What the site shows: the committed documents, and this machine's only where there is no committed one."""
    return documents((fresh_folder(), committed_folder()))


def claims(folders: Iterable[Path] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Measured claims by (method, claim): `value`, `holds`."""
    rows = documents(folders).get("claims", {}).get("claims", [])
    return {(row["method"], row["claim"]): row for row in rows}


def kept_rows(path: Path, name: str, ran: set[str], stamp: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a stored document that a new run leaves: those of methods that did not run.

    A row that was measured in another environment than the new run's, `stamp`, carries its own.
    """
    if not path.exists():
        return []
    document = read(path)
    own = {} if document.get("environment") == stamp else {"environment": document.get("environment")}
    return [own | row for row in document.get(name, []) if row["method"] not in ran]


def csv_text(*documents: dict[str, Any]) -> str:
    """Arenas' documents as one table of CSV, one line a cell; what an arena doesn't have is empty."""
    metrics = dict.fromkeys(metric["name"] for document in documents for metric in document["metrics"])
    axes = dict.fromkeys(name for document in documents for name in document.get("axes", {}))
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["arena", "method", "settings", *axes, "seed", *metrics, "error"])
    for document in documents:
        for row in document["rows"]:
            point = [row.get("axes", {}).get(name) for name in axes]
            figures = [row["figures"].get(name) for name in metrics]
            settings = json.dumps(row["settings"])
            write.writerow(
                [document["arena"], row["method"], settings, *point, row["seed"], *figures, row.get("error")]
            )
    return text.getvalue()


def store_claims(path: Path, rows: Iterable[Any]) -> None:
    """Write measured claims with the environment; those of other methods that stand there are kept."""
    from refimpl.environment import environment

    fresh = [msgspec.to_builtins(row) for row in rows]
    stamp = environment()
    kept = kept_rows(path, "claims", {row["method"] for row in fresh}, stamp)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(kept + fresh, key=lambda row: (row["method"], row["claim"]))
    path.write_text(json.dumps({"environment": stamp, "claims": ordered}, indent=1) + "\n")
