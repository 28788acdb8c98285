"""Beside peers. Oracles: tensors of known size, differences by hand, pytest in a process of its own."""

import json

import pytest
import torch
from typer.testing import CliRunner

import taxonomy
from tools import peers

TEST = """
import torch

def test_pair(peer):
    x = torch.ones(1000)
    peer("lora", "torch", "a thousand ones", lambda: x + {shift}, lambda: x * 1.0, within=0.5)
"""


def compare(ours, theirs):
    return peers.compare("lora", "torch", "this", ours, theirs)


def test_the_difference_is_the_largest_of_all_tensors():
    """Oracle: by hand."""
    pair = compare(
        lambda: (torch.tensor([1.0, 2.0]), [torch.tensor(5)]), lambda: [torch.tensor([1.5, 2.0]), (torch.tensor(4),)]
    )
    assert pair.difference == 1.0
    named = peers.compare(
        "lora", "their procedure, written out in torch", "this", lambda: torch.ones(1), lambda: torch.ones(1)
    )
    assert named.version == pair.version
    assert pair.version == torch.__version__.partition("+")[0] or pair.version == torch.__version__


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"lora returns \(2,\) where torch returns \(3,\)"):
        compare(lambda: torch.ones(2), lambda: torch.ones(3))
    with pytest.raises(ValueError, match="lora returns 0 tensors and torch 0: nothing"):
        compare(list, list)
    with pytest.raises(ValueError, match="lora returns 1 tensors and torch 2"):
        compare(lambda: torch.ones(2), lambda: [torch.ones(2), torch.ones(2)])


@pytest.mark.parametrize(("call", "peak"), [
    (lambda: torch.empty(1000), 4000),
    (lambda: (torch.empty(1000), torch.empty(500)), 6000),
    (lambda: torch.stack([torch.empty(1000) for _ in range(5)]), 40000),
    (lambda: [torch.empty(1000).nbytes for _ in range(5)], 4000),  # one after the other
    (lambda: None, 0),
])  # fmt: skip
def test_peak_bytes(call, peak):
    """Oracle: 4 bytes an element; an allocator may round up to the next 64."""
    call()
    assert peak <= peers.peak_bytes(call) <= peak + 64 * 5


def test_time_is_ours_over_theirs():
    """Oracle: a product of 64 times the work cannot be the faster one by chance in the median of nine."""
    small, large = torch.ones(64, 64), torch.ones(256, 256)
    pair = compare(lambda: torch.ones(1), lambda: torch.ones(1))
    slow = peers.timed(pair, lambda: large @ large, lambda: small @ small)
    fast = peers.timed(pair, lambda: small @ small, lambda: large @ large)
    assert slow.time > 1 > fast.time > 0
    assert slow.memory == pytest.approx(16, rel=0.1)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Tests of a checkout in which `lora` has one test, which the project's own fixtures serve."""
    root = peers.CHECKOUT
    place = tmp_path / "tests" / taxonomy.load().methods["lora"].category
    place.mkdir(parents=True)
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom tests.conftest import *\n"
    )
    (tmp_path / "pyproject.toml").write_text((root / "pyproject.toml").read_text())
    monkeypatch.setattr(peers, "CHECKOUT", tmp_path)
    return place / "test_lora.py"


def test_the_command_stores_and_prints_what_tests_report(checkout, tmp_path):
    checkout.write_text(TEST.format(shift=0.25))
    stored = tmp_path / "peers.json"
    done = CliRunner().invoke(peers.app, ["lora", "-o", str(stored), "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)
    assert (row["method"], row["peer"], row["difference"]) == ("lora", "torch", 0.25)
    assert row["time"] > 0
    assert json.loads(stored.read_text())["peers"] == [row]
    assert json.loads(stored.read_text())["environment"]["torch"]


def test_a_difference_beyond_the_bound_fails_and_says_so(checkout, tmp_path):
    checkout.write_text(TEST.format(shift=0.75))
    done = CliRunner().invoke(peers.app, ["lora", "-o", str(tmp_path / "peers.json")])
    assert done.exit_code == 1
    assert "lora differs from torch by 0.75, more than 0.5" in done.output


def test_a_method_without_a_peer_is_told(checkout, tmp_path):
    checkout.write_text("def test_nothing():\n    assert 1\n")
    done = CliRunner().invoke(peers.app, ["lora", "-o", str(tmp_path / "peers.json")])
    assert done.exit_code == 1
    assert "no method of these has a test that takes the fixture `peer`" in done.output
    assert not (tmp_path / "peers.json").exists()


def test_other_methods_rows_stay(tmp_path):
    path = tmp_path / "peers.json"
    for method in ("lora", "rtn", "lora"):
        peers.store(path, [peers.compare(method, "torch", "x", lambda: torch.ones(1), lambda: torch.ones(1))])
    assert [row["method"] for row in json.loads(path.read_text())["peers"]] == ["lora", "rtn"]
