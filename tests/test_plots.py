"""Plots of an arena, as data. Oracle: by hand."""

import json

import pytest

from refimpl import plots


def row(method, score, cost, *, seed=0, task="sum", length=1, error=None, **rest):
    return {
        "method": method,
        "settings": rest.pop("settings", {}),
        "axes": {"length": length, "task": task},
        "seed": seed,
        "figures": {} if error else {"score": score, "cost": cost},
        "error": error,
        **rest,
    }


def document(rows, axes=("length", "task")):
    metrics = [
        {"name": "score", "unit": "points", "better": "higher"},
        {"name": "cost", "unit": "bytes", "better": "lower"},
    ]
    return {"arena": "toy", "about": "<Toys>.", "metrics": metrics, "axes": {a: [] for a in axes}, "rows": rows,
            "environment": {"torch": "9", "commit": None}, "seeds": [0]}  # fmt: skip


def test_a_trade_off_has_means_and_the_spread_over_seeds():
    """Oracle: 1 and 3 have the mean 2, half of the range is 1; what failed is left out."""
    two, four = {"bits": 2, "group": 8}, {"bits": 4, "group": 8}  # a legend needs no group
    rows = [row("a", 5.0, 9, settings=four), row("a", 1.0, 8, settings=two), row("a", 3.0, 8, seed=1, settings=two)]
    figure, *_ = plots.figures(document([*rows, row("b", 0, 0, error="E: no")]))
    assert (figure["title"], figure["x"], figure["y"]) == ("score against cost", "cost (bytes)", "score (points)")
    [trace] = figure["data"]
    assert trace["name"] == "a" and trace["mode"] == "markers"
    assert (trace["x"], trace["y"], trace["text"]) == ([8, 9], [2, 5], ["bits 2", "bits 4"])
    assert trace["error_y"]["array"] == [1, 0]
    assert figure["buttons"] == []


def test_each_point_of_the_axes_has_a_button_that_replaces_every_trace():
    rows = [row("a", 1.0, 8), row("a", 2.0, 9, task="count"), row("b", 3.0, 7, task="count")]
    figure, *_ = plots.figures(document(rows))
    assert [trace["name"] for trace in figure["data"]] == ["a", "b"]
    assert [trace["y"] for trace in figure["data"]] == [[1.0], []]
    assert [button["label"] for button in figure["buttons"]] == ["length 1, task sum", "length 1, task count"]
    assert [button["update"]["y"] for button in figure["buttons"]] == [[[1.0], []], [[2.0], [3.0]]]
    assert figure["buttons"][1]["update"]["error_y.array"] == [[0.0], [0.0]]


def test_a_first_axis_of_numbers_has_lines_over_it():
    rows = [row("a", float(n), 8, length=n, settings={"bits": 2}) for n in (4, 1, 2)]
    rows.append(row("a", 3.0, 8, settings={"bits": 3}))
    found = {figure["title"]: figure for figure in plots.figures(document(rows))}
    assert set(found) == {"score against cost", "score over length", "cost over length"}
    trace, _ = found["score over length"]["data"]
    assert (trace["x"], trace["y"], trace["name"]) == ([1, 2, 4], [1, 2, 4], "a, bits 2")
    assert found["score over length"]["x"] == "length"
    names = [row("a", 1.0, 8, task=task) for task in ("sum", "count")]
    assert [f["title"] for f in plots.figures(document(names, axes=("task", "length")))] == ["score against cost"]


def step(method, read, taken, per_gb, **rest):
    figures = {"bytes": read, "seconds_per_token": taken, "read_seconds": per_gb}
    return row(method, 0, 0, **rest) | {"figures": figures}


def test_a_roofline_is_bytes_over_bandwidth():
    """Oracle: by hand: reading a GB takes 0.2 s and 0.3 s, 0.25 s in the mean, so that 2 GB take 0.5 s and 8 GB 2 s; each length has its own."""
    metrics = [{"name": name, "unit": "u"} for name in ("bytes", "seconds_per_token", "read_seconds")]
    rows = [
        step("full", 8e9, 4.0, 0.2), step("kivi", 2e9, 5.0, 0.3, settings={"bits": 2}), step("kivi", 0, 0, 0, error="E: no"),
        step("full", 3e9, 6.0, 0.1, length=2), step("full", 3e9, 8.0, 0.1, length=2, seed=1),
    ]  # fmt: skip
    [figure] = plots.roofline(document(rows) | {"metrics": metrics})
    assert figure["log"] == "xy" and (figure["x"], figure["y"]) == ("bytes (u)", "seconds per token (u)")
    full, kivi, line = figure["data"]
    assert (full["x"], full["y"], kivi["x"], kivi["y"], kivi["text"]) == ([8e9], [4.0], [2e9], [5.0], ["kivi"])
    assert (line["name"], line["mode"], line["x"]) == ("bytes over bandwidth", "lines", [2e9, 8e9])
    assert line["line"] == {"dash": "dash"}  # whatever its place among the traces
    assert line["y"] == pytest.approx([0.5, 2.0]) and line["text"] == ["4 GB/s"] * 2
    second = figure["buttons"][1]["update"]
    assert second["x"] == [[3e9], [], [3e9, 3e9]] and second["y"] == [[7.0], [], pytest.approx([0.3, 0.3])]
    assert second["error_y.array"][0] == [1.0]
    assert plots.roofline(document(rows)) == []


@pytest.mark.parametrize(
    ("costs", "scores", "log"),
    [([1, 100], [1.0, 99.0], "x"), ([1, 99], [0.1, 10.0], "y"), ([1, 200], [1.0, 200.0], "xy"), ([0, 100], [-1.0, 99.0], ""), ([5], [5.0], "")],
)  # fmt: skip
def test_an_axis_of_two_decades_is_logarithmic(costs, scores, log):
    """Oracle: by hand; what holds a zero or less has no logarithm, and what only one of the buttons shows counts."""
    rows = [row("a", *pair, length=i) for i, pair in enumerate(zip(scores, costs, strict=True))]
    assert plots.figures(document(rows))[0]["log"] == log


def test_traces_of_one_colour_differ():
    """Oracle: Plotly's ten colours come back with the eleventh trace."""
    figure, *_ = plots.figures(document([row(f"m{i}", 1, 1) for i in range(31)]))
    looks = [(trace["marker"]["symbol"], trace["line"]["dash"]) for trace in figure["data"]]
    assert looks[0] == looks[9] == ("circle", "solid")
    assert len({looks[i] for i in (0, 10, 20, 30)}) == 4
    assert figure["height"] > plots.figures(document([row("m", 1, 1)]))[0]["height"] + 100


def test_curves_are_those_of_the_first_seed():
    curves = {"loss over tokens": [[1, 5.0], [2, None]]}
    rows = [
        row("a", 1, 1, seed=1, curves={"loss over tokens": [[9, 9]]}),
        row("a", 1, 1, curves=curves),
        row("b", 1, 1),
    ]
    figure = plots.figures(document(rows))[-1]
    assert (figure["title"], figure["x"], figure["y"]) == ("loss over tokens", "tokens", "loss")
    [trace] = figure["data"]
    assert (trace["x"], trace["y"], trace["mode"]) == ([1, 2], [5.0, None], "lines")


@pytest.mark.parametrize("rows", [[], [row("a", 0, 0, error="E: no")]])
def test_nothing_to_draw_is_an_empty_plot(rows):
    figure, *_ = plots.figures(document(rows))
    assert figure["data"] == [] and figure["buttons"] == []


def test_figures_of_before_axes_are_drawn():
    old = {"method": "a", "settings": {}, "seed": 0, "figures": {"score": 1.0, "cost": 2}}
    found = document([old])
    del found["axes"]
    [figure] = plots.figures(found)
    assert figure["data"][0]["x"] == [2]


def test_a_page_keeps_texts_as_they_are():
    page = plots.page([document([row("<b>", 1, 1)])], "/* the library */")
    assert "<h1>Arena: toy</h1>" in page and "&lt;Toys&gt;." in page and "/* the library */" in page
    assert "<b>" not in page
    assert "torch 9" in page and "commit" not in page
    assert json.dumps("<b>") not in page


def test_maps_have_a_line_a_method_and_a_column_a_pair():
    """Oracle: by hand: the mean of two seeds, a gap where a method has no point, a button a point of the axes."""
    first, second = ({"score over depth and length": [[0.5, 8, v], [0.0, 8, 1.0], [0.5, 4, 0.0]]} for v in (0.2, 0.4))
    rows = [
        row("a", 1, 1, curves=first, settings={"bits": 2}),
        row("a", 1, 1, curves=second, seed=1, settings={"bits": 2}),
        row("b", 1, 1, curves={"score over depth and length": [[0.5, 8, 0.7]]}),
        row("b", 1, 1, curves=first, task="count"),
        row("c", 1, 1, task="count"),
    ]
    figure = plots.figures(document(rows))[-1]
    assert (figure["title"], figure["x"]) == ("score over depth and length", "length at depth")
    [trace] = figure["data"]
    assert (trace["type"], trace["zmin"], trace["zmax"]) == ("heatmap", 0, 1)
    assert trace["x"] == ["4 at 0.5", "8 at 0", "8 at 0.5"]
    bare = [label.translate(str.maketrans("", "", ", .")) for label in trace["x"]]
    assert not any(
        label.isdigit() for label in bare
    )  # Plotly takes "8, 0.5" for the number 80.5, and its axis for one of numbers
    assert trace["y"] == ["a", "b"]
    assert trace["z"] == [[0.0, 1.0, pytest.approx(0.3)], [None, None, 0.7]]
    assert [button["label"] for button in figure["buttons"]] == ["length 1, task sum", "length 1, task count"]
    assert figure["buttons"][1]["update"] == {"x": [trace["x"]], "y": [["b"]], "z": [[[0.0, 1.0, 0.2]]]}
    assert figure["height"] == 240
    assert 'style="height: 240px"' in plots.page([document(rows)], "")
