"""How the command line shows things: Rich renderables from the objects of the taxonomy and of the arenas."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from taxonomy import Category, Facets, Framework, Method, Paper, Taxonomy

PLACES = (("on", "model"), ("of", "texts"))  # what may take the place of an arena's own
SHORT = 4  # items of a setting that a table shows
SETTINGS = 24  # characters of a table's column of settings, before they fold
RUNS, READS = "[green]●[/]", "[dim]○[/]"


def tree_view(tree: Taxonomy, category: str | None, depth: int | None, only: set[str] | None) -> Tree:
    """The tree of categories with their methods; `only` keeps the methods named, and the categories that hold them."""
    name = tree.categories[category].name if category else "Efficient large language models"
    root = Tree(f"[bold]{escape(name)}[/]")
    _grow(tree, root, category, depth, only)
    root.add(f"{RUNS} runs   {READS} described, no code yet") if depth is None else None
    return root


def _grow(tree: Taxonomy, branch: Tree, category: str | None, depth: int | None, only: set[str] | None) -> None:
    for method in tree.find(category=category) if category else []:
        if method.category == category and (only is None or method.id in only):
            branch.add(f"{RUNS if method.implemented else READS} [cyan]{method.id}[/]  [dim]{method.year}[/]")
    for child in tree.children(category):
        inside = [m for m in tree.find(category=child.id) if only is None or m.id in only]
        if only is not None and not inside:
            continue
        ready = sum(m.implemented for m in inside)
        count = f"[dim]{ready} of {len(inside)} run[/]" if inside else "[dim]reading list[/]"
        twig = branch.add(f"[bold]{child.id.rpartition('/')[2]}[/]  {escape(child.name)}  {count}")
        if depth is None or depth > 1:
            _grow(tree, twig, child.id, None if depth is None else depth - 1, only)


def category_view(tree: Taxonomy, category: Category) -> RenderableType:
    """A category's page for the terminal."""
    head = Text.assemble((category.name, "bold"), "\n", (category.summary, "italic"), "\n")
    tail = Text(f"{len(tree.reading_list(category.id))} papers: effllm papers -c {category.id}", style="dim")
    questions: list[RenderableType] = []
    for question in category.questions:
        questions += [Text(question.asks, style="bold"), _prose(question.answer)]
        questions += [Text(f"  {name}", style="dim") for name in question.claims] + [Text("")]
    return Group(head, _prose(category.text), "", *questions, methods_view(tree.find(category=category.id)), tail)


def method_view(tree: Taxonomy, method: Method) -> RenderableType:
    """A method's page for the terminal."""
    head = Text.assemble((method.name, "bold"), f"  {method.id}  ", (f"{method.year}  {method.category}", "dim"))
    state = f"runs: {method.module}.{method.impl}" if method.implemented else "described, no code yet"
    parts: list[RenderableType] = [
        head,
        Text(method.summary, style="italic"),
        Text(state, style="green" if method.implemented else "yellow"),
        "",
    ]
    parts += [_prose(method.idea), "", Text("When to use it", style="bold"), _prose(method.when), ""]
    parts += [_facet_table(method.facets)]
    if related := tree.relations_of(method.id):
        parts += ["", Text("Relations", style="bold")]
        parts += [Text.assemble(f"  {kind}  ", (", ".join(m.id for m in ms), "cyan")) for kind, ms in related.items()]
    if method.claims:
        parts += ["", Text("Claims", style="bold")]
        for c in method.claims:
            verdict = "" if c.holds else f" Does not hold here: {c.why}"
            text = Text.assemble((c.id, "cyan"), f": {c.says} Expected: {c.expect} ({c.source.where}).{verdict}")
            parts += [Padding(text, (0, 0, 0, 2))]
        parts += [Text(f"  measured: `effllm claims {method.id}`", style="dim")]
    parts += ["", Text("Papers", style="bold"), *(_paper_line(tree.papers[key]) for key in method.papers)]
    return Group(*parts)


def _prose(text: str) -> Markdown:
    """Markdown whose formulas stand as they are written: as code, since Markdown would take their signs for its own."""
    return Markdown(re.sub(r"(\$\$?)([^$]+)\1", lambda formula: f"`{' '.join(formula[2].split())}`", text))


def _facet_table(facets: Facets) -> Table:
    table = Table.grid(padding=(0, 2))
    for name in Facets.__struct_fields__:
        value = getattr(facets, name)
        if value is not None:
            shown = ", ".join(value) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, str(value))
            table.add_row(Text(name.replace("_", " "), style="dim"), shown)
    return table


def _paper_line(paper: Paper) -> Padding:
    return Padding(Text.assemble(paper.title, (f"  {paper.venue} {paper.year}  ", "dim"), paper.url), (0, 0, 0, 2))


def framework_view(framework: Framework) -> RenderableType:
    """A framework's page for the terminal."""
    rows = [
        ("made for", ", ".join(framework.supports)),
        ("built on", ", ".join(framework.libraries)),
        ("ships", ", ".join(framework.ships) or "none of these methods"),
        ("code", framework.code),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [Text(framework.name, style="bold"), Text(framework.summary, style="italic"), ""]
    parts += [Padding(Text(f"- {feature}"), (0, 0, 0, 2)) for feature in framework.features]
    parts += ["", table]
    if framework.note:
        parts += ["", Text(framework.note)]
    return Group(*parts)


def methods_view(methods: Sequence[Method]) -> Table:
    """A list of methods, one line each where the terminal is wide enough."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", width=1)
    table.add_column("method", style="cyan", no_wrap=True)
    table.add_column("year", style="dim")
    table.add_column("summary")
    for m in methods:
        table.add_row(RUNS if m.implemented else READS, m.id, str(m.year), escape(m.summary))
    return table


def papers_view(papers: Sequence[Paper]) -> Table:
    """A list of papers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("key", style="cyan", no_wrap=True, max_width=30)
    table.add_column("year", style="dim")
    table.add_column("venue", style="dim", max_width=14)
    table.add_column("title")
    for p in papers:
        table.add_row(p.key, str(p.year), escape(p.venue), escape(p.title))
    return table


def claims_view(measured: dict[tuple[str, str], dict[str, Any]], methods: Sequence[Method]) -> RenderableType:
    """Claims beside what was measured, a paragraph each."""
    parts: list[RenderableType] = []
    for m in methods:
        for c in m.claims:
            row = measured.get((m.id, c.id))
            verdict = (
                ("not measured yet", "yellow")
                if row is None
                else ("holds", "green")
                if row["holds"]
                else ("does not hold", "red")
            )
            found = f"measured {row['value']:.4g}, " if row else ""
            parts += [
                Text.assemble((f"{m.id}/{c.id}", "cyan"), "  ", verdict),
                Padding(Text(c.says), (0, 0, 0, 2)),
                Padding(
                    Text(f"{c.source.paper}, {c.source.where}: {found}expected {c.expect}", style="dim"), (0, 0, 0, 2)
                ),
            ]
            if row and not row["holds"] and c.why:
                parts.append(Padding(Text(c.why), (0, 0, 0, 2)))
    return Group(*parts)


class SheetRow(NamedTuple):
    """A method with one configuration, at one point of the axes that are not columns: its cells, or why it has none."""

    method: str
    settings: str
    axes: list[str]
    cells: list[str]
    error: str | None = None
    simulated: bool = False


class Sheet(NamedTuple):
    """A table of an arena's figures: one metric over the values of an axis, or all metrics at one point."""

    title: str
    axes: list[str]
    columns: list[str]
    rows: list[SheetRow]


def sheets(document: dict[str, Any], methods: set[str]) -> list[Sheet]:
    """An arena's rows as tables: means over seeds, with the spread where there is more than one; the baseline first.

    Without axes, or at a single point of them, it is one table with a column a metric. Else it is one table a metric, with a
    column for each value of the first axis that has several, and their mean where the values are names; the axes after it
    stand on the left.
    """
    chosen = [row for row in document["rows"] if row["method"] in methods | {document["baseline"]}]
    values: dict[str, list[Any]] = {name: [] for name in document.get("axes", {})}
    for name, found in values.items():
        present = [row["axes"][name] for row in chosen if name in row.get("axes", {})]
        found += [value for value in document["axes"][name] if value in present]
    fixed = [f"{words(name)} {found[0]}" for name, found in values.items() if len(found) == 1]
    first, *others = [name for name, found in values.items() if len(found) > 1] or [""]
    columns = values.get(first, [])
    lines = _lines(chosen, others, values)
    if not first:
        names = [metric["name"] for metric in document["metrics"]]
        rows = [_sheet_row(line, others, [mean_text(line, name) for name in names]) for line in lines]
        return [Sheet(", ".join(fixed), [], [words(name) for name in names], rows)]
    averaged = any(isinstance(value, str) for value in columns)
    heads = [str(value) for value in columns] + ["mean"] * averaged
    made = []
    for metric in document["metrics"]:
        rows = []
        for line in lines:
            parts = [[row for row in line if row.get("axes", {}).get(first) == value] for value in columns]
            cells = [mean_text(part, metric["name"]) for part in parts]
            rows.append(_sheet_row(line, others, cells + [_average(parts, metric["name"])] * averaged))
        title = f"{words(metric['name'])} ({metric['unit']}) by {words(first)}"
        made.append(Sheet(", ".join([title, *fixed]), [words(name) for name in others], heads, rows))
    return made


def _lines(
    rows: Iterable[dict[str, Any]], others: Sequence[str], values: dict[str, list[Any]]
) -> list[list[dict[str, Any]]]:
    """Rows of one method, one configuration and one point of some axes; in the order of the points, then of `in_order`."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in in_order(rows):
        point = json.dumps([row.get("axes", {}).get(name) for name in others])
        groups.setdefault((row["method"], json.dumps(row["settings"]), point), []).append(row)

    def place(line: list[dict[str, Any]]) -> list[int]:
        return [values[name].index(line[0]["axes"][name]) for name in others]

    return sorted(groups.values(), key=place)


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by method, as methods come, and by settings: those that are numbers rise, others keep their order."""
    rows, methods = list(rows), dict[str, dict[str, list[Any]]]()
    for row in rows:
        settings = methods.setdefault(row["method"], {})
        for name, value in row["settings"].items():
            if value not in settings.setdefault(name, []):
                settings[name].append(value)
    for found in (values for settings in methods.values() for values in settings.values()):
        found.sort(key=lambda value: value if _is_number(value) else float("inf"))
    order = list(methods)

    def place(row: dict[str, Any]) -> list[int]:
        own = methods[row["method"]]
        return [order.index(row["method"]), *(own[name].index(value) for name, value in row["settings"].items())]

    return sorted(rows, key=place)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sheet_row(line: Sequence[dict[str, Any]], others: Sequence[str], cells: list[str]) -> SheetRow:
    failed = [row["error"] for row in line if row.get("error")]
    notes = [settings_text(line[0])] if line[0]["settings"] else []
    notes += [f"version {line[0]['version']}"] if "version" in line[0] else []
    notes += [f"{len(failed)} of {len(line)} failed"] if 0 < len(failed) < len(line) else []
    axes = [str(line[0].get("axes", {}).get(name, "")) for name in others]
    error = failed[0] if len(failed) == len(line) else None
    return SheetRow(line[0]["method"], ", ".join(notes), axes, cells, error, bool(line[0].get("simulated")))


def _average(parts: Sequence[Sequence[dict[str, Any]]], metric: str) -> str:
    """Mean of the columns' means, if every column has one."""
    means = [mean(part, metric) for part in parts]
    known = [value for value in means if value is not None]
    return number(sum(known) / len(known)) if len(known) == len(means) else "–"


def figures_view(document: dict[str, Any], methods: set[str], width: int) -> RenderableType:
    """An arena's rows for a terminal of so many columns: what is too wide for it goes on in a further table."""
    parts: list[RenderableType] = []
    for sheet in sheets(document, methods):
        parts += [Text(f"\n{sheet.title}", style="italic")] * bool(sheet.title)
        tables = [_figures_table(sheet, columns, document["baseline"]) for columns in _fitting(sheet, width)]
        parts += [part for table in tables for part in (Text(""), table)][1:]
    return Group(*parts)


def _fitting(sheet: Sheet, width: int) -> list[range]:
    """Columns of figures that stand beside each other, at least one; what is left of them may fold, a figure may not."""
    left = [max(len("method"), *(len(row.method) for row in sheet.rows))]
    settings = max(len(row.settings) for row in sheet.rows)
    left += [min(SETTINGS, max(len("settings"), settings))] * bool(settings)
    left += [
        max(len(text) for text in [name, *column])
        for name, column in zip(sheet.axes, _columns(sheet, "axes"), strict=True)
    ]
    rest = width - sum(left) - len(left)
    groups, used = [range(0)], 0
    for i, (name, cells) in enumerate(zip(sheet.columns, _columns(sheet, "cells"), strict=True)):
        needed = 1 + max(map(len, [*name.split(), *cells]))
        if used + needed > rest and len(groups[-1]):
            groups.append(range(i, i))
            used = 0
        groups[-1] = range(groups[-1].start, i + 1)
        used += needed
    return groups


def _columns(sheet: Sheet, part: str) -> list[tuple[str, ...]]:
    return list(zip(*(getattr(row, part) for row in sheet.rows), strict=True))


def _figures_table(sheet: Sheet, columns: Iterable[int], baseline: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", style="cyan", no_wrap=True)
    with_settings = any(row.settings for row in sheet.rows)
    if with_settings:
        table.add_column("settings", style="dim", max_width=SETTINGS)
    for name in sheet.axes:
        table.add_column(escape(name), style="dim", no_wrap=True)
    for i in columns:
        table.add_column(escape(sheet.columns[i]).replace(" ", "\n"), justify="right", no_wrap=True)
    for row in sheet.rows:
        left = [escape(text) for text in [row.settings] * with_settings + row.axes]
        cells = ["failed" if row.error else row.cells[i] for i in columns]
        table.add_row(escape(row.method), *left, *cells, style="bold" if row.method == baseline else None)
    return table


def arenas_view(arenas: Sequence[dict[str, Any]]) -> Table:
    """Which arenas there are, what they compare, and how much there is to run."""
    table = Table(box=None, pad_edge=False)
    table.add_column("arena", style="cyan", no_wrap=True)
    for name in ("methods", "cells a seed", "quick"):
        table.add_column(name, justify="right")
    table.add_column("about")
    for arena in arenas:
        counts = [number(value) for value in (len(arena["methods"]), arena["cells"], arena["quick_cells"])]
        table.add_row(arena["arena"], *counts, escape(arena["about"]))
    return table


def group_rows(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that differ in the seed alone stand together, in the order of their first."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        same = (row["method"], json.dumps(row["settings"]), json.dumps(row.get("axes", {})))
        groups.setdefault(same, []).append(row)
    return list(groups.values())


def words(name: str) -> str:
    """`group size` of `group_size`."""
    return name.replace("_", " ")


def settings_text(row: dict[str, Any]) -> str:
    """`bits 4, group size 128`."""
    return ", ".join(f"{words(name)} {setting_text(value)}" for name, value in row["settings"].items())


def setting_text(value: Any) -> str:
    """A setting's value, `none`, `yes` or `no`; the items of a list stand side by side, of a long one the first.

    Examples:
        >>> setting_text(2 / 3), setting_text(100_000.0), setting_text([1, 2]), setting_text([])
        ('0.6667', '100000', '1 2', 'empty')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    if not isinstance(value, list):
        return str(value)
    if not value:
        return "empty"
    return " ".join(map(setting_text, value[:SHORT])) + " …" * (len(value) > SHORT)


def mean_text(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Mean of a figure over seeds, `± (max - min) / 2` where seeds differ."""
    values = [row["figures"][metric] for row in rows if metric in row["figures"]]
    middle = mean(rows, metric)
    if middle is None:
        return "–"
    spread = (max(values) - min(values)) / 2
    return number(middle) + (f" ±{number(float(f'{spread:.1g}'))}" if spread else "")


def mean(rows: Sequence[dict[str, Any]], metric: str) -> float | None:
    """Mean of a figure over rows; None if none has it."""
    values = [row["figures"][metric] for row in rows if metric in row["figures"]]
    return float(sum(values) / len(values)) if values else None


def number(value: float) -> str:
    """Four digits or all before the point, thousands separated: `12,800`, `0.0312`, `5.2e-06`."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
