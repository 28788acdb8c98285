"""The graph of methods, categories and papers: `select` takes a part of it, `render` writes it as text.

`layered` and `radial` find the places, `layout` has what both need, `drawing` and `exports` write.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import networkx

from taxonomy.graph.drawing import svg
from taxonomy.graph.exports import dot, mermaid
from taxonomy.graph.layered import layered
from taxonomy.graph.layout import TREE_RELATIONS, Scene
from taxonomy.graph.radial import radial
from taxonomy.schema import RELATIONS, near

if TYPE_CHECKING:
    from taxonomy import Taxonomy
    from taxonomy.graph.layout import Graph

__all__ = ["RELATIONS", "SUFFIXES", "Format", "LayoutName", "arrange", "render", "select"]

Format = Literal["svg", "dot", "mermaid", "graphml", "json"]
LayoutName = Literal["auto", "layered", "radial"]
SUFFIXES: dict[str, Format] = {
    ".svg": "svg",
    ".dot": "dot",
    ".gv": "dot",
    ".mmd": "mermaid",
    ".mermaid": "mermaid",
    ".graphml": "graphml",
    ".json": "json",
}
MOST_LAYERED = 60
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+")


def select(
    tree: "Taxonomy",
    *,
    around: str | None = None,
    depth: int = 1,
    category: str | None = None,
    relation: Sequence[str] = (),
    papers: bool = False,
) -> "Graph":
    """The taxonomy's graph or a part of it; with several conditions, what meets all of them.

    Nodes have the attributes of `Taxonomy.graph`, and `covered` (a method that runs; a paper of one; a category all of
    whose methods run) and `summary`.

    Args:
        tree: a loaded taxonomy.
        around: a method: it, the methods within `depth` relations of it in either direction, and all edges among them.
        depth: number of relations, 0 or more.
        category: a category: it, what is below it, and the edges inside.
        relation: kinds of edges to keep, `in`, `described_by` and `filed_under` included; what none of them touches is
            left out. All kinds if empty.
        papers: whether papers are nodes too.

    Raises:
        ValueError: a method, category or relation that does not exist, a method outside the category, a negative depth.
    """
    _check_names(tree, around, depth, category, relation)
    whole = tree.graph()
    kept = {node for node, data in whole.nodes(data=True) if data.get("kind") and (papers or data["kind"] != "paper")}
    kinds = set(relation) or {*RELATIONS, *TREE_RELATIONS}
    if category is not None:
        kept &= _inside(tree, category)
    if around is not None:
        if around not in kept:
            raise ValueError(
                f"method {around!r} is in {tree.methods[around].category!r}, outside category {category!r}"
            )
        kept = _within(whole, around, depth, kept, kinds, papers)
    edges = [(s, t, d) for s, t, d in whole.edges(data=True) if s in kept and t in kept and d["relation"] in kinds]
    if relation:
        kept = {node for source, target, _ in edges for node in (source, target)} | ({around} if around else set())
    graph: Graph = networkx.MultiDiGraph()
    if around is not None:
        graph.graph["focus"] = around
    covered = _covered(tree)
    for node, data in whole.nodes(data=True):
        if node in kept:
            graph.add_node(node, **data, covered=node in covered, summary=_summary(tree, node))
    graph.add_edges_from((source, target, data) for source, target, data in edges)
    return graph


def _check_names(
    tree: "Taxonomy", around: str | None, depth: int, category: str | None, relation: Sequence[str]
) -> None:
    if around is not None and around not in tree.methods:
        raise ValueError(f"unknown method {around!r}{near(around, tree.methods)} (effllm tree)")
    if category is not None and category not in tree.categories:
        raise ValueError(f"unknown category {category!r}{near(category, tree.categories)} (effllm tree)")
    known = (*RELATIONS, *TREE_RELATIONS)
    for kind in relation:
        if kind not in known:
            raise ValueError(f"unknown relation {kind!r}{near(kind, known) or '; known: ' + ', '.join(known)}")
    if depth < 0:
        raise ValueError(f"depth={depth} must be 0 or more; 1 shows what is directly related")


def _inside(tree: "Taxonomy", category: str) -> set[str]:
    """A category's node and those of everything below it."""

    def below(place: str) -> bool:
        return f"{place}/".startswith(f"{category}/")

    nodes = {f"category:{name}" for name in tree.categories if below(name)}
    nodes |= {name for name, method in tree.methods.items() if below(method.category)}
    return nodes | {f"paper:{key}" for key, paper in tree.papers.items() if any(map(below, paper.categories))}


def _within(whole: "Graph", around: str, depth: int, kept: set[str], kinds: set[str], papers: bool) -> set[str]:
    """Methods within a number of relations of one, breadth first, and their papers if these are asked for."""
    kinds = kinds.difference(TREE_RELATIONS) or set(RELATIONS)
    near_by, border = {around}, {around}
    for _ in range(depth):
        edges = [*whole.out_edges(border, data="relation"), *whole.in_edges(border, data="relation")]
        ends = {node for source, target, kind in edges if kind in kinds for node in (source, target)}
        border = (ends & kept) - near_by
        near_by |= border
    if not papers:
        return near_by
    described = {paper for _, paper, edge in whole.out_edges(near_by, data=True) if edge["relation"] == "described_by"}
    return near_by | described & kept


def _covered(tree: "Taxonomy") -> set[str]:
    """Nodes that count as covered."""
    running = {name for name, method in tree.methods.items() if method.implemented}
    nodes = running | {f"paper:{key}" for name in running for key in tree.methods[name].papers}
    states: dict[str, list[bool]] = {}
    for name, method in tree.methods.items():
        parts = method.category.split("/")
        for i in range(len(parts)):
            states.setdefault("/".join(parts[: i + 1]), []).append(name in running)
    return nodes | {f"category:{category}" for category, runs in states.items() if all(runs)}


def _summary(tree: "Taxonomy", node: str) -> str:
    kind, _, name = node.rpartition(":")
    if kind == "category":
        return tree.categories[name].summary
    return tree.papers[name].title if kind == "paper" else tree.methods[name].summary


def arrange(graph: "Graph", layout: LayoutName = "auto") -> Scene:
    """Positions of a graph's nodes and edges.

    Args:
        graph: from `select` or `Taxonomy.graph`.
        layout: `layered` by year, `radial` by tree, `auto` for the first as long as there are few entries.
    """
    if layout not in get_args(LayoutName):
        raise ValueError(f"unknown layout {layout!r}{near(layout, get_args(LayoutName))}; known: auto, layered, radial")
    entries = sum(data["kind"] != "category" for _, data in graph.nodes(data=True))
    return layered(graph) if layout == "layered" or (layout == "auto" and entries <= MOST_LAYERED) else radial(graph)


def render(
    graph: "Graph",
    format: Format = "svg",
    *,
    layout: LayoutName = "auto",
    link: Callable[[str], str | None] | None = None,
    title: str = "",
) -> str:
    """A graph as text; the same graph gives the same bytes.

    Args:
        graph: from `select` or `Taxonomy.graph`.
        format: `svg`, `dot` (Graphviz), `mermaid`, `graphml`, or `json` (networkx's node-link form).
        layout: of the SVG.
        link: address of a node's page by its id, for the SVG; None for a node without one.
        title: what the SVG shows, for readers who cannot see it.

    Raises:
        ValueError: an unknown format or layout.
    """
    if format not in get_args(Format):
        raise ValueError(
            f"unknown format {format!r}{near(format, get_args(Format))}; known: {', '.join(get_args(Format))}"
        )
    if layout not in get_args(LayoutName):
        raise ValueError(f"unknown layout {layout!r}{near(layout, get_args(LayoutName))}; known: auto, layered, radial")
    clean = _clean(graph)
    if format == "svg":
        return svg(clean, arrange(clean, layout), link, title)
    if format == "json":
        return json.dumps(networkx.node_link_data(clean, edges="edges"), ensure_ascii=False, indent=1) + "\n"
    if format == "graphml":
        return "\n".join(networkx.generate_graphml(clean)) + "\n"
    return dot(clean) if format == "dot" else mermaid(clean)


def _clean(graph: "Graph") -> "Graph":
    """A copy without control characters in its texts, which XML forbids, and without what has no kind or no value."""
    clean: Graph = networkx.MultiDiGraph(**graph.graph)
    for node, data in graph.nodes(data=True):
        if "kind" in data:
            texts = {key: CONTROL.sub(" ", value) if isinstance(value, str) else value for key, value in data.items()}
            clean.add_node(node, **{key: value for key, value in texts.items() if value is not None})
    clean.add_edges_from((s, t, d) for s, t, d in graph.edges(data=True) if s in clean and t in clean)
    return clean
