"""How the command line shows things: Rich renderables from the objects of the taxonomy and of the arenas."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from taxonomy import Category, Facets, Framework, Method, Paper, Taxonomy

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
    return Group(head, _prose(category.text), "", methods_view(tree.find(category=category.id)), tail)


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
        parts += [Text(f"  {c.id}: {c.says} Expected: {c.expect} ({c.source.where})") for c in method.claims]
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
            found = f", measured {row['value']:.4g}" if row else ""
            parts += [
                Text.assemble((f"{m.id}/{c.id}", "cyan"), "  ", verdict),
                Padding(Text(c.says), (0, 0, 0, 2)),
                Padding(
                    Text(f"{c.source.paper}, {c.source.where}: expected {c.expect}{found}", style="dim"), (0, 0, 0, 2)
                ),
            ]
            if row and not row["holds"] and c.why:
                parts.append(Padding(Text(c.why), (0, 0, 0, 2)))
    return Group(*parts)


def figures_view(document: dict[str, Any], methods: set[str]) -> Table:
    """An arena's rows as a table, a column for each setting; means over seeds, with the spread where there is more than one."""
    groups = group_rows(row for row in document["rows"] if row["method"] in methods | {document["baseline"]})
    names = dict.fromkeys(name for rows in groups for name in rows[0]["settings"])
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", style="cyan", no_wrap=True)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", style="dim")
    for metric in document["metrics"]:
        table.add_column(metric["name"].replace("_", " "), justify="right")
    for rows in groups:
        first = rows[0]
        settings = [escape(setting_text(first["settings"].get(name, ""))) for name in names]
        failed = next((row["error"] for row in rows if row.get("error")), None)
        cells = ["failed"] if failed else [mean_text(rows, metric["name"]) for metric in document["metrics"]]
        table.add_row(
            escape(first["method"]),
            *settings,
            *cells,
            style="bold" if first["method"] == document["baseline"] else None,
        )
    return table


def group_rows(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that differ in the seed alone stand together, in the order of their first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], json.dumps(row["settings"])), []).append(row)
    return list(groups.values())


def settings_text(row: dict[str, Any]) -> str:
    """`bits 4, group size 128`."""
    return ", ".join(f"{name.replace('_', ' ')} {setting_text(value)}" for name, value in row["settings"].items())


def setting_text(value: Any) -> str:
    """A setting's value; the items of a list stand side by side."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def mean_text(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Mean of a figure over seeds, `± (max - min) / 2` where seeds differ."""
    values = [row["figures"][metric] for row in rows if metric in row["figures"]]
    if not values:
        return "–"
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return number(mean) + (f" ±{spread:.1g}" if spread else "")


def number(value: float) -> str:
    """Four digits, thousands separated: `12,800`, `0.0312`, `5.2e-06`."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
