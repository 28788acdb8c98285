"""A graph as text for other programs to draw: Graphviz and Mermaid."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from taxonomy.graph.drawing import RELATION_TEXT
from taxonomy.graph.layout import SYMMETRIC, is_covered

if TYPE_CHECKING:
    from taxonomy.graph.layout import Graph


def dot(graph: "Graph") -> str:
    """Graphviz's language; every id and text is quoted."""
    lines = ["digraph effllm {", '  rankdir="LR";', '  node [shape="box", style="rounded", fontname="Helvetica"];']
    shapes = {"category": "folder", "paper": "note", "method": "box"}
    for node, data in graph.nodes(data=True):
        style = "rounded,filled" if is_covered(data) and data["kind"] == "method" else "rounded"
        attributes = {
            "label": data["name"],
            "shape": shapes[data["kind"]],
            "style": style,
            "tooltip": data.get("summary", ""),
        }
        lines.append(f"  {_quoted(node)} [{_pairs(attributes)}];")
    for source, target, relation in _edges(graph):
        attributes = {"label": relation, "dir": "none"} if relation in SYMMETRIC else {"label": relation}
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [{_pairs(attributes)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _edges(graph: "Graph") -> list[tuple[str, str, str]]:
    return [(source, target, str(data["relation"])) for source, target, data in graph.edges(data=True)]


def _pairs(attributes: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in attributes.items())


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def mermaid(graph: "Graph") -> str:
    """Lines of a Mermaid flowchart; ids become words, texts are quoted with its own entities."""
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for i, node in enumerate(graph):
        word = "_".join(re.findall(r"[A-Za-z0-9]+", node if ":" in node else f"method:{node}"))
        ids[node] = word if word not in taken else f"{word}_{i}"
        taken.add(ids[node])
    lines = ["graph LR"]
    for node, data in graph.nodes(data=True):
        state = "covered" if is_covered(data) else "uncovered"
        lines.append(f'  {ids[node]}["{_entities(data["name"])}"]:::{state}')
    for source, target, relation in _edges(graph):
        arrow = {"in": "---", "filed_under": "---"}.get(relation, "-.-" if relation in SYMMETRIC else "-->")
        text = f"|{RELATION_TEXT[relation]}|" if relation in RELATION_TEXT else ""
        lines.append(f"  {ids[source]} {arrow}{text} {ids[target]}")
    lines += ["  classDef covered stroke:#0d8a5f,stroke-width:3px", "  classDef uncovered stroke:#56616d"]
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    return re.sub(r"[^\w\s.,:+/()²³\u0080-\uffff-]", lambda found: f"#{ord(found[0])};", text)
