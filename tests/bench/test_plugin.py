"""A person's own class."""

import sys

import pytest

from refimpl.bench.cells import Plugin
from refimpl.bench.plugin import load_object, open_plugin

MINE = """
class Mine:
    ARENA = {"gain": [1.0, 2.0], "who": ["x"]}
    def __init__(self, gain=0.5, who="y"):
        if gain > 5:
            raise OverflowError("too much")

class Plain:
    pass

class Tuples(Plain):
    ARENA = {"pair": ((1, 2),)}
    def __init__(self, pair): pass

class Sets(Plain):
    ARENA = {"pair": [{1, 2}]}

class Bare(Plain):
    ARENA = {"gain": 1.0}

class Empty(Plain):
    ARENA = {"gain": []}

class Listed(Plain):
    ARENA = ["gain"]

class Hot(Mine):
    ARENA = {"gain": [1.0, 9.0]}

class Unmatched(Plain):
    ARENA = {"rate": [1]}

def function():
    pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with somebody's modules."""
    (tmp_path / "mine_toy.py").write_text(MINE)
    (tmp_path / "broken_toy.py").write_text("1 / 0\n")
    (tmp_path / "needy_toy.py").write_text("import not_there_toy\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("mine_toy", "broken_toy", "needy_toy"):
        sys.modules.pop(name, None)


def test_a_class_of_the_current_directory_with_its_grid(here):
    assert open_plugin("mine_toy:Mine") == Plugin(name="mine_toy:Mine", grid={"gain": [1.0, 2.0], "who": ["x"]})


def test_without_a_grid_it_runs_with_its_defaults(here):
    assert open_plugin("mine_toy:Plain").grid == {}


def test_a_grid_is_what_json_makes_of_it(here):
    """Oracle: JSON has lists and no tuples; cells travel and are stored as JSON."""
    assert open_plugin("mine_toy:Tuples").grid == {"pair": [[1, 2]]}


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("mine_toy", r"'mine_toy' must be package\.module:Class"),
        ("mine_toy:", "must be package.module:Class"),
        (":Mine", "must be package.module:Class"),
        ("mine_toy:Mine:x", "must be package.module:Class"),
        ("mine_toy.py:Mine", "no module 'mine_toy.py'"),
        ("./mine_toy:Mine", "must be package.module:Class"),
        ("nowhere_toy.at.all:Mine", "no module 'nowhere_toy' in "),
        ("mine_toy:Absent", "mine_toy has no 'Absent'; its classes: Bare, Empty, Hot, Listed, Mine"),
        ("mine_toy:function", "is a function; give a class"),
        ("needy_toy:Mine", "needy_toy needs not_there_toy, which is not installed"),
        ("broken_toy:Mine", "importing broken_toy raised ZeroDivisionError: division by zero"),
        ("mine_toy:Sets", r"mine_toy:Sets\.ARENA is not made of JSON values"),
        ("mine_toy:Bare", "ARENA must be {'setting':"),
        ("mine_toy:Empty", "ARENA must be {'setting':"),
        ("mine_toy:Listed", "ARENA must be {'setting':"),
        ("mine_toy:Hot", r"mine_toy:Hot\(gain=9.0\) raised OverflowError: too much"),
        ("mine_toy:Unmatched", r"mine_toy:Unmatched\(rate=1\) raised TypeError"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said(here, reference, said):
    with pytest.raises(ValueError, match=said):
        open_plugin(reference)


def test_an_object_by_its_place():
    from refimpl.compression.quantization.weight_only.rtn import RTN

    assert load_object("refimpl.compression.quantization.weight_only.rtn:RTN") is RTN
