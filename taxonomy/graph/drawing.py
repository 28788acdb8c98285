"""A scene as SVG: shapes with classes, colours as CSS variables, light and dark, nothing loaded and no script.

A drawing that is a document of its own follows the reader's preference; one inside a page follows the page: light, unless
the site's dark scheme is on. Any page restyles it by setting the variables (`--graph-ink` and so on) on `.effllm-graph`:
they are declared with `:where`, which every other rule outweighs. Elements carry no ids, so several drawings can stand in
one page.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from taxonomy.graph.layout import SYMMETRIC, Decor, Label, Link, Mark, Scene, is_covered, line, number, text_width

if TYPE_CHECKING:
    from taxonomy.graph.layout import Graph

ARROW = 7.0
SITE_DARK = '[data-md-color-scheme="slate"] .effllm-graph'
NAMESPACE = "http://www.w3.org/2000/svg"

RELATION_TEXT = {
    "builds_on": "builds on",
    "generalizes": "generalizes",
    "combines": "combines",
    "alternative_to": "alternative to",
    "composes_with": "composes with",
    "described_by": "described by",
}
NODE_TEXT = {
    ("method", True): "implemented",
    ("method", False): "not implemented yet",
    ("category", True): "category",
    ("category", False): "category",
    ("paper", True): "paper, a method of it runs",
    ("paper", False): "paper",
}
LIGHT = {
    "paper": "#ffffff",
    "ink": "#17202a",
    "soft": "#56616d",
    "faint": "#c3cbd4",
    "tint": "#f1f4f7",
    "covered": "#0d8a5f",
    "builds_on": "#1f6fb5",
    "generalizes": "#8e44ad",
    "combines": "#d1495b",
    "alternative_to": "#8a94a0",
    "composes_with": "#c9860a",
    "described_by": "#b3aa94",
}
DARK = {
    "paper": "#14181d",
    "ink": "#e8ecf0",
    "soft": "#a2adb8",
    "faint": "#3b4550",
    "tint": "#1d232a",
    "covered": "#3ecf98",
    "builds_on": "#5eb0f2",
    "generalizes": "#c58be0",
    "combines": "#f07f8e",
    "alternative_to": "#7c8894",
    "composes_with": "#e8b04a",
    "described_by": "#6e6753",
}
RULES = """
.effllm-graph{background:var(--graph-paper);font-family:"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
.effllm-graph .ground{fill:var(--graph-paper)}
.effllm-graph text{fill:var(--graph-soft)}
.effllm-graph .strong{font-weight:700}
.effllm-graph a{text-decoration:none}
.effllm-graph .kind-method text{fill:var(--graph-ink)}
.effllm-graph .kind-method.uncovered text{fill:var(--graph-soft)}
.effllm-graph .kind-category text,.effllm-graph text.family{fill:var(--graph-ink)}
.effllm-graph .shape{fill:var(--graph-paper);stroke:var(--graph-soft)}
.effllm-graph .kind-method.covered .shape{fill:var(--graph-covered);stroke:var(--graph-covered)}
.effllm-graph .kind-method.covered rect.shape~text{fill:var(--graph-paper)}
.effllm-graph .kind-paper.covered rect.shape~text{fill:var(--graph-ink)}
.effllm-graph .kind-category .shape{fill:var(--graph-faint);stroke:none}
.effllm-graph .kind-category rect.shape{fill:var(--graph-tint)}
.effllm-graph .kind-paper .shape{stroke:var(--graph-described_by)}
.effllm-graph .kind-paper.covered .shape{fill:var(--graph-described_by)}
.effllm-graph .edge{fill:none;stroke-width:1.3}
.effllm-graph .rel-in,.effllm-graph .branch{stroke:var(--graph-faint);stroke-width:1}
.effllm-graph .family,.effllm-graph .rule{stroke:var(--graph-faint)}
.effllm-graph path.family{stroke-width:4}
.effllm-graph path.family.covered{stroke:var(--graph-covered)}
.effllm-graph .kind-category text.soft{fill:var(--graph-soft)}
.effllm-graph text.family{stroke:none}
.effllm-graph .band{fill:var(--graph-tint);stroke:none}
.effllm-graph .rel-alternative_to{stroke-dasharray:4 3}
.effllm-graph.radial .edge:not(.rel-in){stroke-opacity:.65}
.effllm-graph .focus .shape{stroke:var(--graph-ink);stroke-width:2.5}
.effllm-graph .focus text{font-weight:700}
.effllm-graph .node:hover .shape{stroke:var(--graph-ink);stroke-width:2}
""".strip()

Linker = Callable[[str], str | None]


def svg(graph: "Graph", scene: Scene, link: Linker | None = None, title: str = "") -> str:
    """The scene as an SVG document.

    Args:
        graph: the graph that the scene was made from.
        scene: positions.
        link: address of a node's page by its id, None for a node without one; no links if left out.
        title: what the picture shows, for readers who cannot see it.
    """
    legend, depth = _legend(graph, scene)
    left, top, width, height = scene.box
    height += depth
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": NAMESPACE,
            "viewBox": " ".join(map(number, (left, top, width, height))),
            "width": number(width),
            "height": number(height),
            "class": f"effllm-graph {scene.kind}",
            "role": "img",
        },
    )
    _add(root, "title", text=title or _title(graph))
    _add(root, "style", text=stylesheet())
    ground = dict(zip(("x", "y", "width", "height"), map(number, (left, top, width, height)), strict=True))
    _add(root, "rect", {"class": "ground", **ground}, fallback={"fill": "#fff"})
    for decor in scene.decor:
        _decor(root, decor)
    edges = _add(root, "g", {"class": "edges"}, fallback={"fill": "none", "stroke": "#888"})
    for edge in scene.links:
        _edge(edges, edge, graph)
    nodes = _add(root, "g", {"class": "nodes"})
    for mark in scene.marks:
        _node(nodes, mark, graph, link)
    root.append(legend)
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def stylesheet() -> str:
    """The drawing's CSS: variables for light and dark, then the rules that use them."""
    light, dark = ("".join(f"--graph-{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    relations = "\n".join(f".effllm-graph .rel-{name}{{stroke:var(--graph-{name})}}" for name in RELATION_TEXT)
    return (
        f"\n:where(.effllm-graph){{{light}}}\n:where({SITE_DARK}){{{dark}}}\n"
        f"@media (prefers-color-scheme:dark){{:where(:root.effllm-graph){{{dark}}}}}\n{RULES}\n{relations}\n"
    )


def _title(graph: "Graph") -> str:
    kinds = [data["kind"] for _, data in graph.nodes(data=True)]
    counts = [
        (kinds.count("method"), "methods"),
        (kinds.count("category"), "categories"),
        (kinds.count("paper"), "papers"),
    ]
    return "Graph of " + ", ".join(f"{count} {name}" for count, name in counts if count)


def _decor(parent: ElementTree.Element, decor: Decor) -> None:
    if decor.path:
        _add(parent, "path", {"class": decor.style, "d": decor.path}, fallback={"fill": "none"})
    if decor.label:
        _text(parent, decor.label)


def _edge(parent: ElementTree.Element, edge: Link, graph: "Graph") -> None:
    path = _add(
        parent,
        "path",
        {
            "class": f"edge rel-{edge.relation}",
            "d": edge.path + (arrow(*edge.head) if edge.head else ""),
            "data-from": edge.source,
            "data-to": edge.target,
            "data-relation": edge.relation,
        },
    )
    names = graph.nodes[edge.source]["name"], graph.nodes[edge.target]["name"]
    _add(path, "title", text=f"{names[0]} {RELATION_TEXT.get(edge.relation, edge.relation)} {names[1]}")


def arrow(x: float, y: float, angle: float) -> str:
    """Path data of an arrowhead, part of its edge: a shared marker would need an id, and pages hold several drawings."""
    wings = [(x - ARROW * math.cos(angle + turn), y - ARROW * math.sin(angle + turn)) for turn in (0.42, -0.42)]
    return line([wings[0], (x, y), wings[1]])


def _node(parent: ElementTree.Element, mark: Mark, graph: "Graph", link: Linker | None) -> None:
    data = graph.nodes[mark.node]
    address = link(mark.node) if link else None
    if address:
        parent = _add(parent, "a", {"href": address})
    attributes = {
        "class": f"node kind-{data['kind']} {'covered' if is_covered(data) else 'uncovered'}"
        + " focus" * (graph.graph.get("focus") == mark.node),
        "data-id": mark.node,
        "data-kind": data["kind"],
        "data-category": str(data.get("category", "")),
        "data-year": str(data.get("year", "")),
        "data-name": data["name"],
    }
    group = _add(parent, "g", attributes)
    _add(group, "title", text=_tooltip(data))
    if mark.width:
        box = (mark.x - mark.width / 2, mark.y - mark.height / 2, mark.width, mark.height)
        shape = dict(zip(("x", "y", "width", "height"), map(number, box), strict=True))
        _add(group, "rect", {"class": "shape", "rx": "4", **shape})
    else:
        _add(
            group,
            "circle",
            {"class": "shape", "cx": number(mark.x), "cy": number(mark.y), "r": number(mark.height / 2)},
        )
    for label in mark.labels:
        _text(group, label)


def _tooltip(data: dict[str, object]) -> str:
    """Name, year, place and state of a node, and what it is."""
    year = f" ({data['year']})" if data.get("year") else ""
    state = NODE_TEXT[str(data["kind"]), is_covered(data)]
    place = f"\n{data['category']}" if data.get("category") else ""
    return f"{data['name']}{year}: {state}{place}" + (f"\n{data['summary']}" if data.get("summary") else "")


def _legend(graph: "Graph", scene: Scene) -> tuple[ElementTree.Element, float]:
    """What shapes and colours mean, of those that occur, in rows under the picture; also its height."""
    left, top, width, height = scene.box
    size = min(max(11.0, width / 110), 18.0)
    group = ElementTree.Element("g", {"class": "legend"})
    entries = [(*entry, 3.7 * size + text_width(entry[2], size)) for entry in _entries(graph, scene)]
    y = top + height + size
    while entries:
        fits = 1
        while fits < len(entries) and sum(entry[3] for entry in entries[: fits + 1]) < width:
            fits += 1
        row, entries = entries[:fits], entries[fits:]
        x = left + (width - sum(entry[3] for entry in row)) / 2 + size
        for kind, sample, text, room in row:
            _sample(group, kind, sample, (x, y), size)
            _text(group, Label(text, x + 2.6 * size, y, size))
            x += room
        y += 1.8 * size
    return group, y - top - height


def _sample(group: ElementTree.Element, kind: str, sample: str, start: tuple[float, float], size: float) -> None:
    x, y = start
    if kind == "node":
        dot = _add(group, "g", {"class": sample})
        _add(dot, "circle", {"class": "shape", "cx": number(x + 1.4 * size), "cy": number(y), "r": number(size * 0.4)})
        return
    end = x + 2 * size
    head = "" if sample.removeprefix("rel-") in SYMMETRIC else arrow(end, y, 0.0)
    shape = {"class": f"edge {sample}", "d": line([(x, y), (end, y)]) + head}
    _add(group, "path", shape, fallback={"fill": "none", "stroke": "#888"})


def _entries(graph: "Graph", scene: Scene) -> list[tuple[str, str, str]]:
    """(edge or node, classes of the sample, text with the number of its kind) of each line of the legend."""
    nodes = [(str(data["kind"]), data["kind"] != "category" and is_covered(data)) for _, data in graph.nodes(data=True)]
    edges = [edge.relation for edge in scene.links]
    return [
        ("node", f"kind-{kind} {'covered' if covered else 'uncovered'}", f"{text} ({nodes.count((kind, covered))})")
        for (kind, covered), text in NODE_TEXT.items()
        if (kind, covered) in nodes
    ] + [
        ("edge", f"rel-{name}", f"{text} ({edges.count(name)})")
        for name, text in RELATION_TEXT.items()
        if name in edges
    ]


def _text(parent: ElementTree.Element, label: Label) -> None:
    attributes = {"x": number(label.x), "y": number(label.y), "dy": ".35em", "font-size": number(label.size)}
    if label.anchor != "start":
        attributes["text-anchor"] = label.anchor
    if label.angle:
        attributes["transform"] = f"rotate({number(label.angle)} {number(label.x)} {number(label.y)})"
    if label.style:
        attributes["class"] = label.style
    _add(parent, "text", attributes, text=label.text)


def _add(
    parent: ElementTree.Element,
    tag: str,
    attributes: dict[str, str] | None = None,
    text: str | None = None,
    fallback: dict[str, str] | None = None,
) -> ElementTree.Element:
    """Append an element; `fallback` are presentation attributes for viewers that know no CSS variables."""
    element = ElementTree.SubElement(parent, tag, {**(fallback or {}), **(attributes or {})})
    element.text = text
    return element
