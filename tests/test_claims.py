"""Measured values beside what papers let expect. Oracles: the small tree's expectations, by hand; pytest in a process of its own."""

import shutil
from pathlib import Path

import pytest

import taxonomy
from refimpl.claims import Measured, find, judge, measure, test_file
from tests.small_tree import FILES, GPTQ

HERE = Path(__file__).parent


@pytest.fixture
def small(small_tree, monkeypatch):
    """The small tree in the place of the installed one."""
    monkeypatch.setattr(taxonomy, "ROOT", small_tree)
    return small_tree


def test_find(small):
    claim = find("rtn", "groups")
    assert (claim.says, claim.holds, claim.expect.below) == ("Small groups have a smaller error.", False, 1.0)


@pytest.mark.parametrize(
    ("method", "claim", "said"),
    [
        ("rtm", "groups", r"unknown method 'rtm'; did you mean 'rtn'\?"),
        ("rtn", "group", r"method 'rtn' states no claim 'group'; did you mean 'groups'\?; add it to its YAML file"),
        ("gptq", "zz", "method 'gptq' states no claim 'zz'; add it to its YAML file"),
    ],
)
def test_what_is_not_stated_cannot_be_measured(small, method, claim, said):
    with pytest.raises(KeyError, match=said):
        find(method, claim)
    with pytest.raises(KeyError, match=said):
        judge(method, claim, 0.0)


@pytest.mark.parametrize(
    ("claim", "value", "holds"),
    [
        ("error-bound", 0.5, True),
        ("error-bound", 0.50001, False),
        ("error-bound", float("nan"), False),
        ("groups", 1.5, False),
        ("groups", 0, True),
    ],
)
def test_judge(small, claim, value, holds):
    """Oracle: below 0.50001, below 1. That a claim is said not to hold changes nothing in what is measured."""
    measured = judge("rtn", claim, value)
    assert (measured.method, measured.claim, measured.holds) == ("rtn", claim, holds)
    assert type(measured.value) is float
    assert measured.value == value or value != value


def test_judge_takes_a_tensor_of_one_number(small):
    import torch

    assert judge("rtn", "groups", torch.tensor(0.25)) == Measured(method="rtn", claim="groups", value=0.25, holds=True)


def test_a_methods_tests_stand_at_its_place(small):
    method = taxonomy.load().methods["dora-x"]
    assert test_file(method, Path("tests")) == Path("tests/finetuning/test_dora_x.py")


CLAIM_TESTS = """
def test_as_stated(claim):
    claim("rtn", "error-bound", 0.25)

def test_otherwise_than_stated(claim):
    claim("rtn", "groups-beat-channels", 7.0)

def test_nothing_reported(claim):
    pass

def test_of_something_else():
    assert False, "this one measures no claim and must not be run"
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose only test is one of RTN's claims, with the real fixtures; claims are looked up in the real tree."""
    path = test_file(taxonomy.load().methods["rtn"], tmp_path / "tests")
    path.parent.mkdir(parents=True)
    path.write_text(CLAIM_TESTS)
    shutil.copy(HERE / "conftest.py", tmp_path / "tests/conftest.py")
    return tmp_path


@pytest.mark.slow
def test_measure_runs_the_tests_that_take_claims(checkout):
    """A claim that comes out otherwise than its file says fails its test, and is reported with its value all the same."""
    rows, code, said = measure(["rtn"], checkout / "tests")
    assert rows == [
        Measured(method="rtn", claim="error-bound", value=0.25, holds=True),
        Measured(method="rtn", claim="groups-beat-channels", value=7.0, holds=False),
    ]
    assert code == 1
    assert "rtn/groups-beat-channels: measured 7, expected < 1 times the error of whole channels: does not hold" in said
    assert "but its YAML file says holds: true" in said
    assert "the test took the fixture `claim` and reported nothing" in said
    assert "must not be run" not in said


def test_measure_of_a_method_without_tests_runs_none(checkout):
    """Not all tests there are, which is what pytest does without arguments."""
    assert measure(["gptq"], checkout / "nowhere") == ([], 0, "")


def test_a_claim_said_not_to_hold_may_not_hold(small):
    """The small tree says so of `groups`, with the reason; the reader would refuse it without."""
    claim = find("rtn", "groups")
    assert not claim.holds
    assert claim.why == "It was larger here."
    assert "holds" not in FILES[GPTQ]
