"""Measured claims: what a test measured, beside what the paper lets expect.

Tests report through the fixture `claim`, which calls `judge`; `measure` runs those tests and stores what they reported.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

import taxonomy
from taxonomy.schema import Claim, near

PERCENT = re.compile(r"\[ *(\d+)%\]")  # of the tests, in pytest's own lines
NOTHING_TO_RUN = 5  # pytest's exit code


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A claim's value as a test measured it, and whether it met the expectation."""

    method: str
    claim: str
    value: float
    holds: bool


def find(method: str, claim: str) -> Claim:
    """The claim as its method's YAML file states it.

    Raises:
        KeyError: no such method or claim.
    """
    tree = taxonomy.load()
    if method not in tree.methods:
        raise KeyError(f"unknown method {method!r}{near(method, tree.methods)}")
    claims = {c.id: c for c in tree.methods[method].claims}
    if claim not in claims:
        raise KeyError(f"method {method!r} states no claim {claim!r}{near(claim, claims)}; add it to its YAML file")
    return claims[claim]


def judge(method: str, claim: str, value: float) -> Measured:
    """Hold a measured value against the claim's expectation."""
    return Measured(
        method=method, claim=claim, value=float(value), holds=find(method, claim).expect.met_by(float(value))
    )


def measure(
    methods: Sequence[str], tests: Path, tell: Callable[[int], None] = lambda _: None
) -> tuple[list[Measured], int, str]:
    """Run the claim tests of some methods (of all, if none is named) in processes of their own.

    Args:
        methods: ids.
        tests: the folder of tests.
        tell: told from time to time how much is done, 0 to 100.

    Returns:
        What was measured, pytest's exit code, and its output.
    """
    tree = taxonomy.load()
    chosen = [tree.methods[name] for name in methods] or [m for m in tree.methods.values() if m.implemented]
    files = [path for m in chosen if (path := test_file(m, tests)).exists()]
    rows, code, said = run_tests("claims", files, tests.parent, ["-n", str(min(2, len(files)))], tell)
    return [msgspec.convert(row, Measured) for row in rows], code, said


def run_tests(
    mark: str,
    files: Sequence[Path],
    root: Path,
    options: Sequence[str] = (),
    tell: Callable[[int], None] = lambda _: None,
) -> tuple[list[Any], int, str]:
    """Run the tests with a mark, and read what they report by `--<mark>-to`.

    Returns:
        The rows, pytest's exit code (0 if there was nothing to run), and its output.
    """
    if not files:  # pytest would take that for all tests there are
        return [], 0, ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-m",
            mark,
            "-p",
            "no:cacheprovider",
            f"--{mark}-to",
            str(report),
        ]
        said = []
        with subprocess.Popen(
            [*command, *options, *map(str, files)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if share := PERCENT.search(line):
                    tell(int(share[1]))
        rows = json.loads(report.read_text()) if report.exists() else []
    nothing = process.returncode == NOTHING_TO_RUN
    return rows, 0 if nothing else process.returncode, "".join(said)


def test_file(method: taxonomy.Method, tests: Path) -> Path:
    """Where a method's tests stand: its place in the tree below `tests`."""
    folder, _, name = method.path.rpartition("/")
    return tests / folder / f"test_{name}.py"


test_file.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name
