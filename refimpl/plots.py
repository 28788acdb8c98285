"""An arena's figures as plots: plain data for Plotly, which the site and `effllm bench --export plots.html` draw.

A figure is `{"title", "x", "y", "data", "buttons"}`: titles of the axes, Plotly's traces, and a button for each point of the
arena's axes, `{"label", "update"}`, whose update puts that point's numbers into the traces; no buttons for a single point. The
`height` is in pixels; `log` names the axes that are logarithmic, as "x", "y", "xy" or "".
"""

import html
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from refimpl.views import PLACES, group_rows, in_order, mean, settings_text, words

Rows = Sequence[dict[str, Any]]
Traces = dict[str, dict[str, Any]]

# Metrics of an arena that can be held against a roofline: what a step reads, what it takes, and what reading a GB takes.
READ, TAKEN, PER_GB = "bytes", "seconds_per_token", "read_seconds"
LINE = "bytes over bandwidth"

# Plotly has ten colours; these tell the next ten traces from the first. Beyond, they begin again.
COLOURS = 10
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x")
DASHES = ("solid", "dash", "dot", "dashdot")
DECADES = 2  # that an axis spans before it is logarithmic


def figures(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All plots of a document but the roofline.

    The first metric against each of the others, with half of the range over seeds; each metric over the first axis, where its
    values are numbers; the curves over the run, of the first seed; and maps, the mean over the seeds.
    """
    rows = _drawn(document)
    first, *others = document["metrics"]
    axes = list(document.get("axes", {}))
    made = [
        _figure(
            f"{_title(first)} against {_title(metric)}",
            (_unit(metric), _unit(first)),
            rows,
            axes,
            partial(_trade_off, x=metric["name"], y=first["name"]),
        )
        for metric in others
    ]
    lengths = {row["axes"][axes[0]] for row in rows if "axes" in row} if axes else set()
    if len(lengths) > 1 and all(isinstance(value, int | float) for value in lengths):
        made += [
            _figure(
                f"{_title(metric)} over {words(axes[0])}",
                (words(axes[0]), _unit(metric)),
                rows,
                axes[1:],
                partial(_over_axis, axis=axes[0], metric=metric["name"]),
            )
            for metric in document["metrics"]
        ]
    for name in dict.fromkeys(name for row in rows for name in row.get("curves", {})):
        y, _, x = name.partition(" over ")
        if any(len(point) > 2 for row in rows for point in row.get("curves", {}).get(name, [])):
            made.append(_map(name, x, [row for row in rows if name in row.get("curves", {})], axes))
        else:
            made.append(_figure(name, (x, y), rows, axes, partial(_curves, curve=name)))
    return made


def roofline(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of a step over the bytes that are held, and the line of what reading these once takes, bytes over bandwidth, as a plot.

    Returns:
        No plot for a document without these metrics.
    """
    known = {metric["name"]: metric for metric in document["metrics"]}
    if not {READ, TAKEN, PER_GB} <= known.keys():
        return []
    rows = _drawn(document)
    units = _unit(known[READ]), _unit(known[TAKEN])
    made = _figure("seconds of a step, and the roofline", units, rows, list(document.get("axes", {})), _above_the_line)
    return [made | {"log": "xy"}]


def _drawn(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What did not fail, in order; of its settings, which name it in a legend, those that not all of its method's rows share."""
    rows = in_order(row for row in document["rows"] if not row.get("error"))
    shared: dict[str, list[tuple[str, Any]]] = {}
    for row in rows:
        own = list(row["settings"].items())
        shared[row["method"]] = [item for item in shared.get(row["method"], own) if item in own]
    return [
        row | {"settings": dict(item for item in row["settings"].items() if item not in shared[row["method"]])}
        for row in rows
    ]


def _above_the_line(rows: Rows) -> Traces:
    per_gb = statistics.fmean(row["figures"][PER_GB] for row in rows)
    read = [row["figures"][READ] for row in rows]
    ends = [min(read), max(read)]
    line = {"x": ends, "y": [per_gb * end / 1e9 for end in ends], "text": [f"{1 / per_gb:.3g} GB/s"] * 2}
    return _trade_off(rows, READ, TAKEN) | {LINE: _trace(LINE, "lines") | line | {"line": {"dash": "dash"}}}


def _title(metric: Mapping[str, Any]) -> str:
    return words(metric["name"])


def _unit(metric: Mapping[str, Any]) -> str:
    return f"{words(metric['name'])} ({metric['unit']})"


def _figure(
    title: str, units: tuple[str, str], rows: Rows, axes: Sequence[str], draw: Callable[[Rows], Traces]
) -> dict[str, Any]:
    """Traces of the first point of some axes, and what the buttons of the others put in their place."""
    drawn = {label: draw(part) for label, part in _by_point(rows, axes).items()}
    empty: Traces = {}
    for name, trace in itertools.chain.from_iterable(traces.items() for traces in drawn.values()):
        empty.setdefault(name, {**trace, "x": [], "y": [], "text": [], "error_y": {"array": []}})
    whole = {label: [traces.get(name, empty[name]) for name in empty] for label, traces in drawn.items()}
    buttons = [{"label": label, "update": _update(traces)} for label, traces in whole.items()]
    data = [_told_apart(trace, i) for i, trace in enumerate(next(iter(whole.values()), []))]
    return {
        "title": title,
        "x": units[0],
        "y": units[1],
        "data": data,
        "buttons": buttons if len(buttons) > 1 else [],
        "height": 360 + 6 * len(data),  # the legend's lines
        "log": "".join(key for key in "xy" if _wide(v for traces in whole.values() for t in traces for v in t[key])),
    }


def _told_apart(trace: dict[str, Any], i: int) -> dict[str, Any]:
    """The trace, the i-th of a plot, with a symbol and a dash that the earlier ones of its colour lack."""
    looks = {
        "marker": {"symbol": SYMBOLS[i // COLOURS % len(SYMBOLS)]},
        "line": {"dash": DASHES[i // COLOURS % len(DASHES)]},
    }
    return looks | trace


def _wide(values: Iterable[float | None]) -> bool:
    """Whether an axis of these values should be logarithmic."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) >= 10**DECADES * min(known)


def _by_point(rows: Rows, axes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows by their point on some axes, in words."""
    points: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = ", ".join(f"{words(name)} {row['axes'][name]}" for name in axes if name in row.get("axes", {}))
        points.setdefault(label, []).append(row)
    return points


def _map(name: str, over: str, rows: Rows, axes: Sequence[str]) -> dict[str, Any]:
    """A line a method, a column for each pair of what the map is over, coloured from 0 to 1: the mean over seeds."""
    first, _, second = over.partition(" and ")
    drawn = {label: _heat(part, name) for label, part in _by_point(rows, axes).items()}
    most = max(len(trace["y"]) for trace in drawn.values())
    names = ("x", "y", "z")
    buttons = [{"label": label, "update": {key: [trace[key]] for key in names}} for label, trace in drawn.items()]
    return {
        "title": name,
        "x": f"{second} at {first}",
        "y": "",
        "data": [next(iter(drawn.values()))],
        "buttons": buttons if len(buttons) > 1 else [],
        "height": 200 + 20 * most,
        "log": "",
    }


def _heat(rows: Rows, name: str) -> dict[str, Any]:
    columns = sorted({(y, x) for row in rows for x, y, _ in row["curves"][name]})
    groups = {_named(group[0]): group for group in group_rows(rows)}
    values = []
    for group in groups.values():
        found: dict[tuple[float, float], list[float]] = {}
        for x, y, value in (point for row in group for point in row["curves"][name]):
            found.setdefault((y, x), []).append(value)
        values.append([statistics.fmean(found[column]) if column in found else None for column in columns])
    return {
        "type": "heatmap",
        "x": [f"{y:g} at {x:g}" for y, x in columns],  # a comma between them, and Plotly would read one number
        "y": list(groups),
        "z": values,
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
    }


def _update(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("x", "y", "text")
    return {name: [trace[name] for trace in traces] for name in names} | {
        "error_y.array": [trace["error_y"]["array"] for trace in traces]
    }


def _trace(name: str, mode: str) -> dict[str, Any]:
    return {"name": name, "mode": mode, "type": "scatter", "x": [], "y": [], "text": [], "error_y": {"array": []}}


def _add(trace: dict[str, Any], x: float | None, group: Rows, metric: str, text: str) -> None:
    values = [row["figures"][metric] for row in group]
    trace["x"].append(x)
    trace["y"].append(mean(group, metric))
    trace["text"].append(text)
    trace["error_y"]["array"].append((max(values) - min(values)) / 2)


def _trade_off(rows: Rows, x: str, y: str) -> Traces:
    traces: Traces = {}
    for group in group_rows(rows):
        name = group[0]["method"]
        _add(
            traces.setdefault(name, _trace(name, "markers")), mean(group, x), group, y, settings_text(group[0]) or name
        )
    return traces


def _named(row: dict[str, Any]) -> str:
    return ", ".join(part for part in (row["method"], settings_text(row)) if part)


def _over_axis(rows: Rows, axis: str, metric: str) -> Traces:
    traces: Traces = {}
    for group in sorted(group_rows(rows), key=lambda group: group[0]["axes"][axis]):
        name = _named(group[0])
        _add(traces.setdefault(name, _trace(name, "lines+markers")), group[0]["axes"][axis], group, metric, name)
    return traces


def _curves(rows: Rows, curve: str) -> Traces:
    traces: Traces = {}
    for group in group_rows(rows):
        points = min(group, key=lambda row: row["seed"]).get("curves", {}).get(curve)
        if points:
            name = _named(group[0])
            x, y = zip(*points, strict=True)
            traces[name] = {**_trace(name, "lines"), "x": list(x), "y": list(y), "text": [name] * len(points)}
    return traces


def page(documents: Iterable[Mapping[str, Any]], plotly: str) -> str:
    """A page of all plots of some documents that needs nothing else; `plotly` is the library's source."""
    parts = []
    for document in documents:
        name = document["arena"] + "".join(f" {word} {document[key]}" for word, key in PLACES if key in document)
        parts.append(f"<h1>Arena: {html.escape(name)}</h1>\n<p>{html.escape(document['about'])}</p>")
        stamp = ", ".join(f"{key} {value}" for key, value in document["environment"].items() if value is not None)
        parts.append(f"<p><small>seeds {document['seeds']}; {html.escape(stamp)}</small></p>")
        parts += [
            f'<h2>{html.escape(figure["title"])}</h2>\n<div class="plot" style="height: {figure["height"]}px"'
            f' data-figure="{html.escape(json.dumps(figure))}"></div>'
            for figure in [*roofline(document), *figures(document)]
        ]
    return PAGE.replace("{BODY}", "\n".join(parts)).replace("{PLOTLY}", plotly)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>effllm bench</title>
<style>body { font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }</style>
<script>{PLOTLY}</script></head><body>
{BODY}
<script>
for (const element of document.querySelectorAll(".plot")) {
  const { data, x, y, buttons, log } = JSON.parse(element.dataset.figure);
  const layout = { xaxis: { title: { text: x } }, yaxis: { title: { text: y }, automargin: true }, showlegend: true };
  for (const axis of log) layout[`${axis}axis`].type = "log";
  if (data[0]?.type === "heatmap") layout.yaxis.autorange = "reversed";  // the first method at the top
  if (buttons.length) layout.updatemenus = [{ x: 0, xanchor: "left", y: 1.12, yanchor: "bottom",
    buttons: buttons.map(({ label, update }) => ({ label, method: "restyle", args: [update] })) }];
  Plotly.newPlot(element, data, layout, { responsive: true, displaylogo: false });
}
</script></body></html>
"""
