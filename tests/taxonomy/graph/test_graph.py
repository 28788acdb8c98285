import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import networkx
import pytest

from taxonomy.graph import arrange, render, select
from taxonomy.schema import RELATIONS

SVG = "{http://www.w3.org/2000/svg}"


def declared(tree):
    """(source, target, relation) straight from the entries."""
    return {(m.id, target, kind) for m in tree.methods.values() for kind, target in m.relations.items()}


def of(graph):
    return {(source, target, data["relation"]) for source, target, data in graph.edges(data=True)}


@pytest.mark.parametrize("kinds", [(), ("builds_on",), ("generalizes", "alternative_to")])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_around_reaches_exactly_what_is_so_many_relations_away(grow, depth, kinds):
    """Oracle: brute force, every walk of at most `depth` steps over the declared relations, in either direction."""
    tree = grow(30, seed=depth)
    edges = {edge for edge in declared(tree) if not kinds or edge[2] in kinds}
    steps = {(a, b) for a, b, _ in edges} | {(b, a) for a, b, _ in edges}
    for centre in list(tree.methods)[::7]:
        reached = {centre}
        for length in range(1, depth + 1):
            for walk in walks(steps, centre, length):
                reached.add(walk)
        chosen = select(tree, around=centre, depth=depth, relation=kinds)
        touched = {node for a, b, _ in edges if a in reached and b in reached for node in (a, b)} | {centre}
        assert set(chosen) == (touched if kinds else reached)
        assert of(chosen) == {edge for edge in edges if edge[0] in reached and edge[1] in reached}


def walks(steps, start, length):
    ends = {start}
    for _ in range(length):
        ends = {b for a, b in steps if a in ends}
    return ends


def test_whole_graph_leaves_papers_out_unless_asked(grow):
    tree = grow(25, papers=10)
    assert Counter(nx["kind"] for _, nx in select(tree).nodes(data=True)) == {
        "method": 25,
        "category": len(tree.categories),
    }
    assert set(select(tree, papers=True)) == set(tree.graph())
    assert of(select(tree, papers=True)) == of(tree.graph())


def test_category_holds_what_is_below_and_edges_inside(grow):
    tree = grow(40, papers=20)
    for place in ("f0", "f1"):
        chosen = select(tree, category=place, papers=True)
        below = {c for c in tree.categories if c == place or c.startswith(f"{place}/")}
        expected = {f"category:{c}" for c in below} | {m.id for m in tree.methods.values() if m.category in below}
        expected |= {f"paper:{p.key}" for p in tree.papers.values() if below.intersection(p.categories)}
        assert set(chosen) == expected
        assert of(chosen) == {edge for edge in of(tree.graph()) if edge[0] in expected and edge[1] in expected}


def test_a_category_is_not_its_namesake(make_forest, entries):
    places = [entries.category(name) for name in ("kv", "kv_cache")]
    tree = make_forest(
        places, [entries.method("a", "kv"), entries.method("b", "kv_cache")], [entries.paper("p", ["kv"])]
    )
    assert set(select(tree, category="kv")) == {"category:kv", "a"}


def test_relation_keeps_only_what_it_touches(grow):
    tree = grow(30)
    chosen = select(tree, relation=["combines"])
    assert of(chosen) == {edge for edge in declared(tree) if edge[2] == "combines"}
    assert set(chosen) == {node for edge in of(chosen) for node in edge[:2]}
    assert {edge[2] for edge in of(select(tree, relation=["combines", "in"]))} == {"combines", "in"}


def test_papers_of_the_neighbourhood(grow):
    tree = grow(20, papers=8)
    chosen = select(tree, around="m5", depth=1, papers=True)
    methods = [node for node in chosen if node in tree.methods]
    assert {node for node in chosen if node.startswith("paper:")} == {
        f"paper:{k}" for m in methods for k in tree.methods[m].papers
    }


def test_covered_means_runs_or_is_run_by_all(make_forest, entries):
    tree = make_forest(
        [entries.category(name) for name in ("a", "a/x", "a/y", "b")],
        [
            entries.method("one", "a/x", impl="One", papers=["p"]),
            entries.method("two", "a/y", papers=["q"]),
            entries.method("three", "a/x", impl="Three", papers=["p"]),
        ],
        [entries.paper("p", ["a"]), entries.paper("q", ["a"])],
    )
    covered = {node for node, data in select(tree, papers=True).nodes(data=True) if data["covered"]}
    assert covered == {"one", "three", "paper:p", "category:a/x"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"around": "m55"}, r"unknown method 'm55'; did you mean 'm5'\?"),
        ({"category": "f0x"}, r"unknown category 'f0x'; did you mean 'f0'\?"),
        ({"relation": ["build_on"]}, r"unknown relation 'build_on'; did you mean 'builds_on'\?"),
        ({"around": "m1", "depth": -1}, "depth=-1 must be 0 or more"),
        ({"around": "inside", "category": "other"}, "method 'inside' is in 'home', outside category 'other'"),
    ],
)
def test_unknown_names_are_refused_with_the_near_one(grow, make_forest, entries, wrong, message):
    tree = grow(6)
    if wrong.get("around") == "inside":
        places = [entries.category("home"), entries.category("other")]
        tree = make_forest(places, [entries.method("inside", "home")], [entries.paper("p", ["home"])])
    with pytest.raises(ValueError, match=message):
        select(tree, **wrong)


def test_unknown_format_and_layout_are_refused(awkward):
    with pytest.raises(ValueError, match=r"unknown format 'svgg'; did you mean 'svg'\?"):
        render(awkward, "svgg")
    with pytest.raises(ValueError, match=r"unknown layout 'radiall'; did you mean 'radial'\?"):
        render(awkward, layout="radiall")


def test_few_entries_are_layered_and_many_stand_in_a_circle(grow):
    assert arrange(select(grow(40))).kind == "layered"
    assert arrange(select(grow(100))).kind == "radial"
    assert arrange(select(grow(100)), "layered").kind == "layered"


def test_graphml_reads_back(awkward):
    again = networkx.read_graphml(io.BytesIO(render(awkward, "graphml").encode()), force_multigraph=True)
    assert of(again) == of(awkward)
    assert again.nodes["n0"] == {
        "kind": "method",
        "name": '<b>&"A"</b>',
        "year": 2020,
        "category": "x",
        "implemented": True,
    }
    assert again.nodes["n3"]["name"] == "tab bell  end"
    assert "note" not in again.nodes["paper:n0"]


def test_json_reads_back(awkward):
    again = networkx.node_link_graph(json.loads(render(awkward, "json")), edges="edges")
    assert isinstance(again, networkx.MultiDiGraph)
    assert of(again) == of(awkward)
    assert again.nodes["n4"]["name"] == awkward.nodes["n4"]["name"]


def dot_tokens(text):
    """Oracle: Graphviz's lexical rules: names, quoted strings in which only \\" is an escape, and single marks."""
    pattern = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([A-Za-z_][A-Za-z_0-9]*)|(->|[{}\[\]=;,]))', re.S)
    position, tokens = 0, []
    while text[position:].strip():
        found = pattern.match(text, position)
        assert found, text[position : position + 40]
        tokens.append(found[0].strip())
        position = found.end()
    return tokens


def test_dot_is_well_formed_and_loses_nothing(awkward):
    tokens = dot_tokens(render(awkward, "dot"))
    assert tokens[:3] == ["digraph", "effllm", "{"]
    assert tokens[-1] == "}"
    assert tokens.count("->") == awkward.number_of_edges()
    labels = [tokens[i + 2][1:-1] for i, token in enumerate(tokens) if token == "label"]
    assert {found for label in labels for found in re.findall(r"\\.", label)} == {'\\"', "\\\\"}
    plain = [re.sub(r"\\(.)", r"\1", label) for label in labels]
    assert plain[:3] == ['<b>&"A"</b>', "a]b|c{d}", "back\\slash\\N `tick` #35;"]
    statements = " ".join(tokens).split(" ; ")
    for statement in statements[1:-1]:
        assert (
            re.fullmatch(r'(digraph effllm \{ )?("[^"]*"|node)( -> "[^"]*")? \[.*\]', statement)
            or "rankdir" in statement
        )


def test_mermaid_ids_are_words_and_texts_are_escaped(awkward):
    lines = render(awkward, "mermaid").splitlines()
    assert lines[0] == "graph LR"
    nodes = [found for text in lines if (found := re.fullmatch(r'  (\w+)\["([^"]*)"\]:::(?:un)?covered', text))]
    assert len(nodes) == len(awkward) == len({found[1] for found in nodes})
    for found, name in zip(nodes, ['<b>&"A"</b>', "a]b|c{d}", "back\\slash\\N `tick` #35;"], strict=False):
        assert not set(re.sub(r"#\d+;", "", found[2])) & set('<>&"`#|{}[]\\')
        assert re.sub(r"#(\d+);", lambda code: chr(int(code[1])), found[2]) == name
    edges = [found for text in lines if (found := re.fullmatch(r"  (\w+) (-->|-\.-|---)(\|[a-z ]+\|)? (\w+)", text))]
    assert len(edges) == awkward.number_of_edges()
    assert {found[i] for found in edges for i in (1, 4)} <= {found[1] for found in nodes}


def test_mermaid_ids_stay_apart_where_words_coincide():
    graph = networkx.MultiDiGraph()
    for node in ("a-b", "a_b", "method:a-b", "category:a/b", "category:a_b", "end"):
        graph.add_node(node, kind="method", name=node, category="x")
    ids = re.findall(r"^  (\w+)\[", render(graph, "mermaid"), re.M)
    assert len(set(ids)) == 6
    assert "end" not in ids


@pytest.mark.parametrize("layout", ["layered", "radial"])
def test_svg_holds_every_node_and_relation(awkward, layout):
    root = ElementTree.fromstring(
        render(awkward, layout=layout, link=lambda node: f"x/{node}/?a=1&b=2", title="A <title>")
    )
    nodes = {group.get("data-id"): group for group in root.iter(f"{SVG}g") if "node" in group.get("class", "").split()}
    assert set(nodes) == set(awkward)
    assert nodes["n0"].get("data-name") == '<b>&"A"</b>'
    assert nodes["n0"].get("class") == "node kind-method covered"
    assert nodes["n1"].get("class") == "node kind-method uncovered"
    assert (nodes["n1"].get("data-category"), nodes["n1"].get("data-year")) == ("x", "2021")
    assert nodes["n1"].find(f"{SVG}title").text.startswith("a]b|c{d} (2021): not implemented yet")
    assert {a.get("href") for a in root.iter(f"{SVG}a")} == {f"x/{node}/?a=1&b=2" for node in awkward}
    assert root.find(f"{SVG}title").text == "A <title>"
    drawn = Counter(
        (path.get("data-from"), path.get("data-to"), path.get("data-relation"))
        for path in root.iter(f"{SVG}path")
        if path.get("data-relation") not in (None, "in")
    )
    assert drawn == Counter(edge for edge in of(awkward) if edge[2] not in ("in", "filed_under"))
    for path in root.iter(f"{SVG}path"):
        if path.get("data-relation") in RELATIONS:
            assert path.get("class") == f"edge rel-{path.get('data-relation')}"
            symmetric = path.get("data-relation") in ("alternative_to", "composes_with")
            assert path.get("d").count("M") == (1 if symmetric else 2)  # the second one draws the arrowhead
    assert not [element for element in root.iter() if element.get("id")]  # several drawings can share a page


def test_svg_links_only_where_there_is_a_page(awkward):
    root = ElementTree.fromstring(render(awkward, link=lambda node: "page" if node == "n2" else None))
    (only,) = root.iter(f"{SVG}a")
    assert only.find(f"{SVG}g").get("data-id") == "n2"
    assert not list(ElementTree.fromstring(render(awkward)).iter(f"{SVG}a"))


def test_svg_has_a_style_for_the_dark(awkward):
    style = ElementTree.fromstring(render(awkward)).find(f"{SVG}style").text
    assert "prefers-color-scheme:dark" in style
    used, set_ = (set(re.findall(pattern, style)) for pattern in (r"var\((--graph-\w+)\)", r"(--graph-\w+):"))
    assert used <= set_
    light, page, dark = (block for block in re.findall(r"\{([^{}]*--graph-[^{}]*:[^{}]*)\}", style) if ":#" in block)
    assert light != dark == page
    assert [rule.split(":")[0] for rule in light.split(";")] == [rule.split(":")[0] for rule in dark.split(";")]


def test_legend_counts_what_is_drawn(grow):
    tree = grow(30)
    root = ElementTree.fromstring(render(select(tree)))
    (legend,) = (group for group in root.iter(f"{SVG}g") if group.get("class") == "legend")
    texts = {text.text for text in legend.iter(f"{SVG}text")}
    runs = sum(m.implemented for m in tree.methods.values())
    assert {
        f"implemented ({runs})",
        f"not implemented yet ({30 - runs})",
        f"category ({len(tree.categories)})",
    } <= texts
    assert f"builds on ({sum(edge[2] == 'builds_on' for edge in declared(tree))})" in texts


@pytest.mark.parametrize("kind", ["svg", "dot", "mermaid", "graphml", "json"])
def test_nothing_is_drawn_as_nothing(kind):
    assert render(networkx.MultiDiGraph(), kind)


def test_a_dangling_edge_is_left_out():
    """A taxonomy that is read with errors can hold one; networkx makes a bare node of it."""
    graph = networkx.MultiDiGraph()
    graph.add_node("a", kind="method", name="A", year=2020, category="x", implemented=False)
    graph.add_edge("a", "gone", relation="builds_on")
    for kind, layout in itertools.product(["svg", "dot", "mermaid", "json"], ["layered", "radial"]):
        assert "gone" not in render(graph, kind, layout=layout)


def test_same_bytes_whatever_the_hash_seed(grow, tmp_path):
    graph = select(grow(40, papers=30), papers=True)
    source = tmp_path / "graph.json"
    source.write_text(render(graph, "json"), encoding="utf-8")
    program = (
        "import sys, json, networkx; from taxonomy.graph import render\n"
        f"g = networkx.node_link_graph(json.load(open({str(source)!r}, encoding='utf-8')), edges='edges')\n"
        "print(*(render(g, f, layout=l) for f, l in [('svg', 'layered'), ('svg', 'radial'), ('dot', 'auto')]))"
    )
    root = Path(__file__).parents[3]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert first == second
    assert len(first) > 10_000
    assert select(grow(40, seed=3)).nodes(data=True) == select(grow(40, seed=3)).nodes(data=True)
