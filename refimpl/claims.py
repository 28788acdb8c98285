"""Measured claims: what a test measured, beside what the paper lets expect.

Tests report through the fixture `claim`, which calls `judge`; `measure` runs those tests and stores what they reported.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

import taxonomy
from taxonomy.schema import Claim, near


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


def measure(methods: Sequence[str], tests: Path) -> tuple[list[Measured], int, str]:
    """Run the claim tests of some methods (of all, if none is named) in a process of their own.

    Returns:
        What was measured, pytest's exit code, and its output.
    """
    tree = taxonomy.load()
    chosen = [tree.methods[name] for name in methods] or [m for m in tree.methods.values() if m.implemented]
    files = [str(path) for m in chosen if (path := test_file(m, tests)).exists()]
    if not files:  # pytest would take that for all tests there are
        return [], 0, ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "claims.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "claims",
            "-p",
            "no:cacheprovider",
            "--claims-to",
            str(report),
        ]
        done = subprocess.run([*command, *files], cwd=tests.parent, capture_output=True, text=True, check=False)
        rows = json.loads(report.read_text()) if report.exists() else []
    return [msgspec.convert(row, Measured) for row in rows], done.returncode, done.stdout + done.stderr


def test_file(method: taxonomy.Method, tests: Path) -> Path:
    """Where a method's tests stand: its place in the tree below `tests`."""
    folder, _, name = method.path.rpartition("/")
    return tests / folder / f"test_{name}.py"


test_file.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name
