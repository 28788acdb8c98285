"""One cell: what becomes of its figures and of its errors."""

import math
import sys

import msgspec
import pytest
import torch

from refimpl.bench.cells import Cell, open_arena
from refimpl.bench.measure import measure
from refimpl.bench.runner import Row
from tests.bench.conftest import toy


def test_a_cell_repeats_from_its_seed_whatever_ran_before(toys):
    """Oracle: the same cell again; the toy draws from its generator and from PyTorch's own. Control: another seed."""
    first = measure(toy(seed=5))
    torch.seed()
    assert measure(toy(seed=5)).figures == first.figures
    assert measure(toy(seed=6)).figures != first.figures


def test_a_cell_leaves_no_trace_in_pytorchs_own_generator(toys):
    before = torch.get_rng_state()
    measure(toy())
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_axes_and_form_reach_the_method(toys):
    """Oracle: the toy's rule, gain + 10 x length + the seed's draws; its curve has two steps in the quick form, else four."""
    base = measure(toy(None)).figures["score"]
    assert measure(toy(gain=3.0)).figures["score"] - base == pytest.approx(3)
    assert measure(toy(gain=3.0, length=4)).figures["score"] - base == pytest.approx(33)
    assert measure(toy(gain=2.0)).curves == {"score over steps": [(0, 0), (1, 2), (2, 4), (3, 6)]}
    assert len(measure(toy(quick=True)).curves["score over steps"]) == 2


def test_figures_come_in_the_arenas_order_and_whole_numbers_stay_whole(toys, monkeypatch):
    figures = {"cost": torch.tensor(3.5), "score": 2**60}
    monkeypatch.setattr(open_arena("toy"), "baseline", lambda _: figures)
    found = measure(toy(None)).figures
    assert list(found.items()) == [("score", 2**60), ("cost", 3.5)]
    assert isinstance(found["score"], int) and isinstance(found["cost"], float)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"score": 1.0}, "ValueError: figures ['score'] are not the arena's ['cost', 'score']"),
        ({"score": 1.0, "cost": 1.0, "more": 1.0}, "are not the arena's"),
        ({"score": math.nan, "cost": 1.0}, "ValueError: score is nan"),
        ({"score": 1.0, "cost": -math.inf}, "ValueError: cost is -inf"),
        ({"score": "x", "cost": 1.0}, "ValueError: could not convert"),
        (None, "TypeError"),
    ],
)
def test_figures_that_cannot_be_compared_are_an_error(toys, monkeypatch, figures, said):
    monkeypatch.setattr(open_arena("toy"), "baseline", lambda _: figures)
    outcome = measure(toy(None))
    assert said in outcome.error
    assert outcome.figures == {} == outcome.curves


def test_what_a_method_raises_is_its_outcome(toys):
    assert measure(toy("Bad")).error == "RuntimeError: no luck"
    assert measure(toy(unknown=1)).error.startswith("TypeError: ")
    assert "has no 'Absent'" in measure(toy("Absent")).error
    (toys / "refimpl/toys/broken.py").write_text("class Good(:\n")
    broken = msgspec.structs.replace(toy(), implementation="refimpl.toys.broken:Good")
    assert "importing refimpl.toys.broken raised SyntaxError" in measure(broken).error


def test_a_method_that_leaves_leaves_its_cell_only(toys, monkeypatch):
    monkeypatch.setattr(open_arena("toy"), "baseline", lambda _: sys.exit("enough"))
    assert measure(toy(None)).error == "SystemExit: enough"


def test_a_real_method_in_a_real_arena():
    rtn = "refimpl.compression.quantization.weight_only.rtn:RTN"
    outcome = measure(Cell(arena="weights", method="rtn", implementation=rtn, settings={"bits": 77}))
    assert outcome.error == "ValueError: bits=77 must be 1 to 8"
    outcome = measure(Cell(arena="weights", method="rtn", implementation=rtn, settings={"bits": 4}, quick=True))
    assert outcome.error is None and 0 < outcome.figures["output_error"] < 0.5


def test_a_model_is_passed_on(tmp_path):
    outcome = measure(Cell(arena="weights", method="16 bit", implementation=None, model=str(tmp_path)))
    assert f"--model {tmp_path}" in outcome.error


def test_a_curve_that_diverges_has_gaps_and_is_json(toys, monkeypatch):
    def baseline(conditions):
        conditions.curves["loss"] = [(1, 2.5), (2, math.inf), (3, math.nan)]
        return {"score": 1, "cost": 1}

    monkeypatch.setattr(open_arena("toy"), "baseline", baseline)
    curves = measure(toy(None)).curves
    assert curves == {"loss": [(1.0, 2.5), (2.0, None), (3.0, None)]}
    row = Row(arena="toy", method="x", settings={}, seed=0, figures={}, curves=curves)
    assert b"NaN" not in msgspec.json.encode(row)
