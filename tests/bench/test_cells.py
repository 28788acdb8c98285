"""What there is to run. Oracle: counted by hand, on a toy arena of two tasks and three lengths."""

from pathlib import Path

import msgspec
import pytest

from refimpl.bench.cells import Plugin, arenas, cells, combinations, open_arena, points
from taxonomy import ROOT
from taxonomy.reader import read


@pytest.fixture
def rtn():
    return msgspec.structs.replace(read(ROOT).methods["rtn"], arena={"toy": {"bits": [2, 4], "group_size": [8, 16]}})


def test_the_full_form_is_the_product_of_settings_axes_and_seeds_after_the_baseline(toys, rtn):
    """Oracle: by hand. 2 tasks x 3 lengths x 2 seeds, once for the baseline and once for each of 2 x 2 settings."""
    found = cells([rtn], seeds=(0, 1))
    assert len(found) == 12 * (1 + 4)
    assert all(c.method == "nothing" and c.implementation is None and c.settings == {} for c in found[:12])
    assert {c.method for c in found[12:]} == {"rtn"}
    assert found[12].implementation == "refimpl.compression.quantization.weight_only.rtn:RTN"
    assert len({msgspec.json.encode(c) for c in found}) == 60
    assert {(c.axes["task"], c.axes["length"]) for c in found} == {(t, n) for t in ("sum", "count") for n in (1, 2, 4)}
    assert not any(c.quick for c in found)


def test_the_quick_form_has_first_settings_few_points_and_says_so(toys, rtn):
    """Oracle: by hand. One task, two lengths, the first value of each setting."""
    found = cells([rtn], quick=True)
    assert [(c.method, c.axes["length"]) for c in found] == [("nothing", 1), ("nothing", 2), ("rtn", 1), ("rtn", 2)]
    assert {c.axes["task"] for c in found} == {"sum"}
    assert found[2].settings == {"bits": 2, "group_size": 8}
    assert all(c.quick for c in found)


def test_an_axis_that_quick_does_not_name_keeps_all_its_values(toys, monkeypatch):
    monkeypatch.setattr(open_arena("toy"), "QUICK", {"length": (4,)})
    assert points(open_arena("toy"), quick=True) == [{"task": "sum", "length": 4}, {"task": "count", "length": 4}]


def test_only_the_arenas_asked_for_and_plugins_in_each(toys, rtn):
    """Oracle: by hand. A method that is not in an arena has no cell there; a plugin has its grid."""
    found = cells([rtn], arenas=["weights"], plugins=[Plugin(name="mine:Mine", grid={"a": [1, 2]})])
    assert [(c.method, c.settings) for c in found] == [("16 bit", {}), ("mine:Mine", {"a": 1}), ("mine:Mine", {"a": 2})]
    assert all(c.implementation == "mine:Mine" for c in found[1:])


def test_place_and_model_are_every_cells(toys, rtn):
    assert {(c.device, c.model) for c in cells([rtn], device="cuda:1", model="here")} == {("cuda:1", "here")}


def test_texts_of_the_users_bring_their_axes(toys, rtn, monkeypatch):
    """Oracle: by hand. The quick form leaves none of what the user's folder has out."""
    with pytest.raises(ValueError, match="--texts here: this arena takes no texts of the user's"):
        cells([rtn], texts="here")
    told = []

    def axes_of(folder):
        told.append(folder)
        return {"task": ("sum", "essay"), "length": (8,)}

    monkeypatch.setattr(open_arena("toy"), "axes_of", axes_of, raising=False)
    found = cells([], arenas=["toy"], texts="here")
    assert [(c.axes["task"], c.axes["length"], c.texts) for c in found] == [("sum", 8, "here"), ("essay", 8, "here")]
    quick = cells([], arenas=["toy"], texts="here", quick=True)
    assert [(c.axes["task"], c.axes["length"]) for c in quick] == [("sum", 8), ("essay", 8)]
    assert set(told) == {Path("here")}
    assert {c.texts for c in cells([rtn])} == {None}


def test_combinations_of_nothing_are_one():
    assert combinations({}) == [{}] == combinations({}, quick=True)


def test_arenas_are_the_modules_of_the_folder(toys):
    found = arenas()
    assert {"weights", "finetuning", "attention", "toy"} <= set(found)
    assert "protocol" not in found and found == sorted(found)


@pytest.mark.parametrize("name", ["nowhere", "protocol", "../weights", "", "weights.py", "__init__"])
def test_an_unknown_arena_is_named(name):
    with pytest.raises(ValueError, match=r"unknown arena .*effllm bench"):
        open_arena(name)


def test_an_arenas_name_may_be_misspelt_or_dashed(toys):
    (toys / "refimpl/arena/long_toy.py").write_text((toys / "refimpl/arena/toy.py").read_text())
    assert open_arena("long-toy").ABOUT == "Toys, by points."
    with pytest.raises(ValueError, match="did you mean 'weights'"):
        open_arena("wieghts")


@pytest.mark.parametrize("name", arenas())
def test_every_arena_declares_what_the_protocol_asks(name):
    """Its quick form is a part of the full one, its figures have names of their own, and settings of methods can be given."""
    arena = open_arena(name)
    assert isinstance(arena.VERSION, int) and arena.ABOUT.endswith(".") and arena.BASELINE
    names = [metric.name for metric in arena.METRICS]
    assert names and len({*names}) == len(names)
    assert all(metric.better in ("lower", "higher", "neither") and metric.unit for metric in arena.METRICS)
    assert all(values for values in arena.AXES.values())
    for axis, values in arena.QUICK.items():
        assert values and set(values) <= set(arena.AXES[axis])
    assert msgspec.json.decode(msgspec.json.encode(points(arena))) == points(arena)


def test_every_arena_that_a_method_joins_is_there():
    joined = {name: m.id for m in read(ROOT).methods.values() for name in m.arena}
    assert {name: method for name, method in joined.items() if name not in arenas()} == {}
