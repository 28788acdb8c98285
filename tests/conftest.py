"""Fixtures every test may use, and the option that collects measured claims."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from refimpl.claims import find, judge
from tests.forest import awkward, entries, grow, make_forest  # noqa: F401 - fixtures
from tests.small_tree import write
from tools import peers

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device for the tests that take one (default: cpu)")
    parser.addoption("--claims-to", help="write what the tests measured about claims to this JSON file")
    parser.addoption(
        "--peers-to", help="time the methods that have a peer, and write what was measured to this JSON file"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Two workers with two threads each on two cores wait for each other: tiny products take many times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in ("claim", "peer"):
        path = config.getoption(f"--{name}s-to")
        if path and not hasattr(config, "workerinput"):
            config.pluginmanager.register(Report(name, Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in {"claim", "peer"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(f"{name}s")


class Report:
    """Gathers what all tests measured under a name, worker processes included, and writes it at the end."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.rows = name, path, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == self.name]

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(sorted(self.rows, key=lambda row: list(row.values())[:2]), indent=1))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make site` builds it from what is committed, strict; built once a session."""
    out = tmp_path_factory.mktemp("site")
    for command in (["tools.docs"], ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def small_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `taxonomy` of a small valid checkout, to be read or broken; compiled forms go beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "checkout")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What draws from the global source, as `transformers` does for new weights, draws the same whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness, new for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen by `--device`."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, float], None]]:
    """`claim("rtn", "error-bound", value)`: record a measured value; fails if the YAML file tells it otherwise."""
    outcomes = []

    def record(method: str, name: str, value: float) -> None:
        measured = judge(method, name, value)
        request.node.user_properties.append(("claim", msgspec.to_builtins(measured)))
        outcomes.append((measured, find(method, name)))

    yield record
    assert outcomes, "the test took the fixture `claim` and reported nothing"
    for measured, stated in outcomes:
        verdict = "holds" if measured.holds else "does not hold"
        assert measured.holds == stated.holds, (
            f"{measured.method}/{measured.claim}: measured {measured.value:g}, expected {stated.expect}: {verdict}, "
            f"but its YAML file says holds: {str(stated.holds).lower()}"
        )


@pytest.fixture
def measured_layer(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """Outputs, inputs and calibration rows of the layer that two implementations are held together on: large where they are timed."""
    return (2048, 2048, 4096) if request.config.getoption("--peers-to") else (256, 256, 512)


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`peer("lora", "peft", "a layer of 512", ours, theirs, within=1e-5)`: hold two calls' results together.

    With `--peers-to` it also measures their time and memory.
    """
    reported = []

    def record(
        method: str, name: str, what: str, ours: Callable[[], Any], theirs: Callable[[], Any], *, within: float
    ) -> None:
        pair = peers.compare(method, name, what, ours, theirs)
        if request.config.getoption("--peers-to"):
            pair = peers.timed(pair, ours, theirs)
        request.node.user_properties.append(("peer", msgspec.to_builtins(pair)))
        reported.append(pair)
        assert pair.difference <= within, f"{method} differs from {name} by {pair.difference:g}, more than {within:g}"

    yield record
    assert reported, "the test took the fixture `peer` and compared nothing"
