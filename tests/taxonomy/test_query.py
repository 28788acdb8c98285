"""Oracles: brute force over the files as `yaml.safe_load` reads them; parsers of BibTeX and JSON that are not ours."""

import itertools
import json
import random
import re
from types import MappingProxyType

import msgspec
import networkx
import pytest
import yaml

import taxonomy
from taxonomy.query import Taxonomy
from taxonomy.schema import RELATIONS, Category, Compiled, Facets, Framework, Method, Paper
from tests.small_tree import AWQ, DORA, FILES, GPTQ, LAYERS, LORA, QLORA, RTN

PLACES = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "lora": LORA, "qlora": QLORA, "dora-x": DORA}
LEAVES = {name: yaml.safe_load(FILES[place]) for name, place in PLACES.items()}


@pytest.fixture
def tree(small_tree):
    return taxonomy.load(small_tree)


@pytest.fixture(scope="module")
def real():
    return taxonomy.load()


def ids(methods):
    return [m.id for m in methods]


# find


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        ({}, ["rtn", "gptq", "awq", "lora", "dora-x", "qlora"]),
        ({"category": "compression"}, ["rtn", "gptq", "awq"]),
        ({"category": LAYERS}, ["rtn", "gptq", "awq"]),
        ({"category": "finetuning"}, ["lora", "dora-x", "qlora"]),
        ({"category": "systems"}, []),
        ({"tag": "post-training"}, ["rtn", "gptq", "awq", "lora", "dora-x", "qlora"]),
        ({"tag": "gptq-like"}, ["gptq"]),
        ({"tag": "gptq"}, []),
        ({"year": 2023}, ["awq", "dora-x", "qlora"]),
        ({"year": 2018}, []),
        ({"venue": "iclr"}, ["gptq", "lora", "qlora"]),
        ({"venue": "ICLR", "year": 2023}, ["qlora"]),
        ({"implemented": True}, ["rtn"]),
        ({"implemented": False}, ["gptq", "awq", "lora", "dora-x", "qlora"]),
        ({"relation": "builds_on"}, ["gptq", "dora-x", "qlora"]),
        ({"relation": "builds_on:lora"}, ["dora-x", "qlora"]),
        ({"relation": "combines:rtn"}, ["qlora"]),
        ({"relation": "generalizes"}, []),
        ({"facets": {"calibration": True}}, ["gptq"]),
        ({"facets": {"stage": "prefill"}}, ["gptq"]),
        ({"facets": {"gqa": True}}, ["awq"]),
        ({"facets": {"gqa": None}}, ["rtn", "gptq", "lora", "dora-x", "qlora"]),
        ({"facets": {"training": "partial", "exact": False}}, ["lora"]),
        ({"category": "compression", "implemented": False, "facets": {"calibration": False}}, ["awq"]),
        ({"text": "   "}, ["rtn", "gptq", "awq", "lora", "dora-x", "qlora"]),
        ({"text": "what rtn does"}, ["rtn"]),
        ({"text": "rtn gptq"}, []),
        ({"text": "ACCURATE"}, ["gptq"]),
        ({"text": "lora", "category": "finetuning"}, ["lora", "qlora", "dora-x"]),
    ],
)
def test_find_on_the_small_tree(tree, conditions, found):
    """Oracle: the files, by hand; `lora` is in the ids of two and in the papers' titles of the third."""
    assert ids(tree.find(**conditions)) == found


def test_a_category_is_not_found_by_the_start_of_its_name(tree):
    """`fine` and `finetuning` are two folders."""
    compiled = tree_of(tree)
    compiled.categories["fine"] = msgspec.structs.replace(compiled.categories["finetuning"], id="fine")
    compiled.methods["lora"] = msgspec.structs.replace(compiled.methods["lora"], category="fine")
    both = Taxonomy(tree.root, compiled)
    assert ids(both.find(category="fine")) == ["lora"]
    assert ids(both.find(category="finetuning")) == ["dora-x", "qlora"]


def brute(real, conditions):
    """The same question, put to the YAML files' own values."""
    found = set()
    for name, m in real.methods.items():
        papers = [real.papers[key] for key in m.papers]
        facets = msgspec.to_builtins(m.facets)
        edges = {(kind, t) for kind, targets in msgspec.to_builtins(m.relations).items() for t in targets}
        right = True
        for key, value in conditions.items():
            if key == "category":
                right &= m.category == value or m.category[: len(value) + 1] == value + "/"
            elif key == "tag":
                right &= m.tags.count(value) > 0
            elif key == "year":
                right &= papers[0].posted == value
            elif key == "venue":
                right &= value.lower() in [p.venue.lower() for p in papers]
            elif key == "implemented":
                right &= (m.impl is not None) is value
            elif key == "relation":
                kind, _, target = value.partition(":")
                right &= bool(edges & ({(kind, target)} if target else {(kind, t) for t in real.methods}))
            elif key == "facets":
                for facet, wanted in value.items():
                    right &= (
                        wanted in facets[facet]
                        if facet == "stage"
                        else facets[facet] is wanted or facets[facet] == wanted
                    )
            elif key == "text":
                above = [c.name for c in real.categories.values() if f"{m.category}/".startswith(f"{c.id}/")]
                fields = (name, m.name, *m.tags, *above, m.summary, m.idea, m.when, *(p.title for p in papers))
                right &= all(any(word in field.lower() for field in fields) for word in value.lower().split())
        if right:
            found.add(name)
    return found


def choices(real):
    """For each filter, values that occur, and one that does not."""
    methods = list(real.methods.values())
    edges = {edge for m in methods for edge in m.relations.items()}
    return {
        "category": sorted(real.categories),
        "tag": [*sorted({t for m in methods for t in m.tags}), "no-such-tag"],
        "year": [*sorted({m.year for m in methods}), 1900],
        "venue": [*sorted({p.venue for p in real.papers.values()}), "iclr", "Nowhere"],
        "implemented": [True, False],
        "relation": [*RELATIONS, *sorted(f"{kind}:{target}" for kind, target in edges)],
        "facets": [
            {"training": "none"}, {"training": "full", "exact": False}, {"stage": "decode"}, {"calibration": True}, {"gqa": None},
            {"frees_memory": True, "changes_architecture": False}, {"attention_scores": False}, {"fused_attention": True},
        ],
        "text": ["quantiz", "attention", "low rank", "a", "GPTQ", "the weights of", "zzzz", "Hessian inverse"],
    }  # fmt: skip


def test_each_filter_alone_against_brute_force(real):
    values = choices(real)
    for key in values:
        for value in values[key]:
            assert set(ids(real.find(**{key: value}))) == brute(real, {key: value}), (key, value)


def test_filters_together_against_brute_force(real):
    """Every pair of filters at two values each, and 150 draws of three to eight; most must not be empty."""
    values, rng, hits = choices(real), random.Random(0), 0
    asked = [
        {a: rng.choice(values[a]), b: rng.choice(values[b])}
        for a, b in itertools.combinations(values, 2)
        for _ in range(2)
    ]
    for _ in range(150):  # around a method, so that there is something to be found
        m = rng.choice(list(real.methods.values()))
        true = {
            "category": m.category.split("/")[0],
            "tag": m.tags[0] if m.tags else "x",
            "year": m.year,
            "venue": real.papers[m.papers[-1]].venue.upper(),
            "implemented": m.impl is not None,
            "relation": next((kind for kind, _ in m.relations.items()), "combines"),
            "facets": {"exact": m.facets.exact, "training": m.facets.training},
            "text": m.name.split()[0],
        }
        asked.append({key: true[key] for key in rng.sample(sorted(true), rng.randint(3, 8))})
    for conditions in asked:
        found = ids(real.find(**conditions))
        assert len(set(found)) == len(found)
        assert set(found) == brute(real, conditions), conditions
        hits += bool(found)
    assert hits > 150


def test_ranking(tree):
    """Name and id before tags, tags before summary and titles, those before the text; reading order within."""
    compiled = tree_of(tree)
    replace = msgspec.structs.replace
    blank = dict.fromkeys(("idea", "when"), "nothing " * 9)
    for name, change in {
        "rtn": {**blank, "idea": "about xyzzy " * 9},
        "gptq": {**blank, "summary": "Does xyzzy."},
        "awq": {**blank, "tags": ["xyzzy"]},
        "lora": {**blank, "name": "XYZZY-LoRA"},
        "qlora": {**blank, "when": "xyzzy " * 9},
        "dora-x": blank,
    }.items():
        compiled.methods[name] = replace(compiled.methods[name], **change)
    ranked = Taxonomy(tree.root, compiled)
    assert ids(ranked.find("xyzzy")) == ["lora", "awq", "gptq", "rtn", "qlora"]
    assert ids(ranked.find("XYZZY does")) == ["gptq", "awq", "lora", "rtn", "qlora"]  # the weaker word counts


def test_who_asks_for_a_method_by_its_id_or_name_finds_it_first(real):
    for m in real.methods.values():
        assert real.find(m.id)[0] == m
        assert real.find(m.name)[0].name == m.name  # two may share one


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"category": "compresion"}, r"unknown category 'compresion'; did you mean 'compression'\?"),
        ({"category": ""}, "unknown category ''; known: compression, "),
        ({"category": "compression/"}, "unknown category 'compression/'; did you mean 'compression'"),
        ({"relation": "build_on"}, r"unknown relation 'build_on'; did you mean 'builds_on'\?"),
        (
            {"relation": ""},
            "unknown relation ''; known: builds_on, generalizes, combines, alternative_to, composes_with",
        ),
        ({"relation": "builds_on:rtm"}, r"unknown method 'rtm'; did you mean 'rtn'\?"),
        ({"facets": {"trainin": "none"}}, r"unknown facet 'trainin'; did you mean 'training'\?"),
        ({"facets": {"training": "no"}}, "facet 'training' is never 'no'; it is one of none, partial, full"),
        ({"facets": {"stage": "decoding"}}, "facet 'stage' is never 'decoding'; it is one of data, pre-training, "),
        ({"facets": {"exact": "maybe"}}, "facet 'exact' is never 'maybe'; it is one of yes, no"),
        ({"facets": {"gqa": 1}}, "facet 'gqa' is never 1; it is one of yes, no, null"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(tree, conditions, said):
    with pytest.raises(ValueError, match=said):
        tree.find(**conditions)


# the parts


def tree_of(tree):
    """A copy of what a taxonomy holds, to be changed."""
    return Compiled(
        categories=dict(tree.categories), methods=dict(tree.methods), papers=dict(tree.papers), frameworks={}, survey={}
    )


def test_what_is_loaded_is_read_only(tree):
    for name in ("categories", "methods", "papers", "frameworks", "survey"):
        mapping = getattr(tree, name)
        assert isinstance(mapping, MappingProxyType)
        with pytest.raises(TypeError):
            mapping["x"] = None
    with pytest.raises(AttributeError):
        tree.methods["gptq"].name = "x"
    with pytest.raises(AttributeError):
        tree.papers["gptq"].year = 1
    assert tree.methods["gptq"].name == "GPTQ"


def test_children_and_reading_list(tree):
    assert [c.id for c in tree.children(None)] == ["compression", "finetuning", "systems"]
    assert [c.id for c in tree.children("compression")] == ["compression/quantization"]
    assert tree.children(LAYERS) == []
    assert [p.key for p in tree.reading_list(LAYERS)] == ["awq", "gptq", "rtn-2018"]  # newest first, then by title
    assert tree.reading_list("compression") == []


def test_related_to_gives_the_edges_that_point_at_a_method(tree):
    """Oracle: the files."""
    assert sorted((kind, m.id) for kind, m in tree.related_to("lora")) == [
        ("alternative_to", "dora-x"), ("builds_on", "dora-x"), ("builds_on", "qlora"), ("combines", "qlora"), ("composes_with", "gptq"),
    ]  # fmt: skip
    assert tree.related_to("awq") == []


def test_neighbours_by_the_name_of_their_relation(tree):
    """Oracle: the files; a symmetric relation reads the same from both sides, in the order of the relations, then of years."""
    assert {name: ids(methods) for name, methods in tree.relations_of("lora").items()} == {
        "built on by": ["dora-x", "qlora"], "part of": ["qlora"], "alternative to": ["dora-x"], "composes with": ["gptq"],
    }  # fmt: skip
    assert {name: ids(methods) for name, methods in tree.relations_of("gptq").items()} == {
        "builds on": ["rtn"], "alternative to": ["awq"], "composes with": ["lora"],
    }  # fmt: skip
    assert list(tree.relations_of("lora")) == ["built on by", "part of", "alternative to", "composes with"]


def test_neighbours_are_seen_from_both_sides(real):
    """Oracle: the edges of the graph, each turned round."""
    turned = {
        "builds on": "built on by", "generalizes": "special case of", "combines": "part of",
        "alternative to": "alternative to", "composes with": "composes with",
    }  # fmt: skip
    expected = set()
    for source, target, kind in real.graph().edges(data="relation"):
        if source in real.methods and target in real.methods:
            name = kind.replace("_", " ")
            expected |= {(source, name, target), (target, turned[name], source)}
    found = [(m, name, n.id) for m in real.methods for name, others in real.relations_of(m).items() for n in others]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_repr_counts(tree):
    assert repr(tree) == "<Taxonomy: 6 categories, 6 methods (1 run), 5 papers>"


# graph


def test_graph_of_the_small_tree(tree):
    """Oracle: nodes and edges put together from the files' own values."""
    graph = tree.graph()
    folders = [name.removesuffix("/_category.yaml") for name in FILES if name.endswith("_category.yaml")]
    papers = {
        key: (int(name[7:11]), entry)
        for name, text in FILES.items()
        if name.startswith("papers/")
        for key, entry in yaml.safe_load(text).items()
    }
    assert {n for n, kind in graph.nodes(data="kind") if kind == "category"} == {f"category:{f}" for f in folders}
    assert {n for n, kind in graph.nodes(data="kind") if kind == "paper"} == {f"paper:{key}" for key in papers}
    assert {n for n, kind in graph.nodes(data="kind") if kind == "method"} == LEAVES.keys()
    edges = {(f"category:{f}", f"category:{f.rpartition('/')[0]}", "in") for f in folders if "/" in f}
    edges |= {
        (f"paper:{key}", f"category:{c}", "filed_under")
        for key, (_, entry) in papers.items()
        for c in entry["categories"]
    }
    for name, leaf in LEAVES.items():
        edges.add((name, f"category:{PLACES[name].rpartition('/')[0]}", "in"))
        edges |= {(name, f"paper:{key}", "described_by") for key in leaf["papers"]}
        edges |= {(name, target, kind) for kind, targets in leaf["relations"].items() for target in targets}
    assert sorted(graph.edges(data="relation")) == sorted(edges)
    assert all(data.keys() == {"relation"} for _, _, data in graph.edges(data=True))
    assert graph.nodes["rtn"] == {
        "kind": "method",
        "name": "RTN",
        "year": 2017,
        "category": LAYERS,
        "implemented": True,
    }
    assert graph.nodes["paper:gptq"] == {"kind": "paper", "name": "GPTQ: Accurate", "year": 2023}
    assert graph.nodes["category:systems"] == {"kind": "category", "name": "Systems"}


def test_graph_of_the_real_tree(real):
    """Every node that an edge touches was put there; the tree of categories is a forest; `builds_on` has no cycle."""
    graph = real.graph()
    assert isinstance(graph, networkx.MultiDiGraph)
    assert len(graph) == len(real.categories) + len(real.methods) + len(real.papers)
    assert all({"kind", "name"} <= data.keys() for _, data in graph.nodes(data=True))
    inner = graph.edge_subgraph(e for e in graph.edges(keys=True) if graph.edges[e]["relation"] == "in")
    assert networkx.is_forest(inner.to_undirected())
    built = graph.edge_subgraph(e for e in graph.edges(keys=True) if graph.edges[e]["relation"] == "builds_on")
    assert networkx.is_directed_acyclic_graph(built)


# BibTeX

ESCAPES = {
    r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textbackslash{}": "\\", r"\textbraceleft{}": "\0", r"\textbraceright{}": "\1",
    r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_",
}  # fmt: skip


def parse_bibtex(text):
    """Entries as {key: (type, {field: value})}, by counting braces as BibTeX does."""
    entries, at = {}, 0
    while (start := re.compile(r"@(\w+)\{([^,\s]+),\s*").search(text, at)) is not None:
        assert not text[at : start.start()].strip(), "something between two entries"
        fields, at = {}, start.end()
        while text[at] != "}":
            name = re.compile(r"(\w+)\s*=\s*\{").match(text, at)
            assert name, f"a field is expected at {text[at : at + 40]!r}"
            depth, end = 1, name.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            fields[name[1]] = text[name.end() : end - 1]
            at = re.compile(r",?\s*").match(text, end).end()
        entries[start[2]] = (start[1], fields)
        at += 1
    assert not text[at:].strip()
    return entries


def plain(latex):
    """What a reader sees of a field's LaTeX: escapes resolved, protecting braces dropped."""
    for escape, sign in ESCAPES.items():
        latex = latex.replace(escape, sign)
    return latex.replace("{", "").replace("}", "").replace("\0", "{").replace("\1", "}")


def check_entries(text, papers):
    entries = parse_bibtex(text)
    assert list(entries) == [p.key for p in papers]
    for p in papers:
        kind, fields = entries[p.key]
        assert plain(fields["title"]) == p.title
        assert fields["year"] == str(p.year)
        assert fields["url"] == p.url
        assert plain(fields.get("author", "")) == " and ".join(p.authors)
        assert (fields.get("eprint"), fields.get("archivePrefix")) == ((p.arxiv, "arXiv") if p.arxiv else (None, None))
        known = {
            "arXiv": "misc",
            "Blog": "misc",
            "GitHub": "misc",
            "Website": "misc",
            "TMLR": "article",
            "TACL": "article",
        }
        if p.venue in (*known, "ICLR", "NeurIPS"):
            assert kind == known.get(p.venue, "inproceedings")
        place = {"misc": None, "article": "journal", "inproceedings": "booktitle"}[kind]
        assert place is None or plain(fields[place]) == p.venue


def test_bibtex_of_everything_reads_back(tree, real):
    check_entries(tree.bibtex(), list(tree.papers.values()))
    check_entries(real.bibtex(), list(real.papers.values()))


def test_bibtex_by_hand(tree):
    """Oracle: by hand. Capitals keep their case in any style since they stand in braces."""
    assert tree.bibtex(["rtn-2018"]) == (
        "@inproceedings{rtn-2018,\n"
        "  title         = {{Integers} \\& more: 5\\% of \\$100\\_x},\n"
        "  year          = {2018},\n"
        "  booktitle     = {CVPR},\n"
        "  eprint        = {1712.05877},\n"
        "  archivePrefix = {arXiv},\n"
        "  url           = {https://example.org/rtn-2018},\n"
        "}\n"
    )


@pytest.mark.parametrize(
    "title",
    [
        r"E^2-LLM",
        "~A ^B \\C",
        "a_B & {C} % #D $E$",
        "}{",
        r"\textbf{X}",
        "Größe: ΔE≥0",
        "(LLMs) [MoE] 'Q' \"R\"",
        "A",
        "lower only",
    ],
)
def test_bibtex_of_special_characters(tree, title):
    """In title, author and venue; the reader sees what was meant, and the braces balance."""
    compiled = tree_of(tree)
    paper = msgspec.structs.replace(compiled.papers["lora"], title=title, authors=[title, "Bob"], venue=title)
    compiled.papers["lora"] = paper
    check_entries(Taxonomy(tree.root, compiled).bibtex(["lora"]), [paper])


def test_bibtex_takes_keys_papers_and_methods_once_each(tree):
    chosen = [tree.methods["qlora"], "gptq", tree.papers["lora"], "gptq"]
    assert list(parse_bibtex(tree.bibtex(chosen))) == ["qlora", "lora", "gptq"]
    assert tree.bibtex([]) == ""
    with pytest.raises(KeyError, match=r"unknown paper 'gtpq'; did you mean 'gptq'"):
        tree.bibtex(["gtpq"])


# export


@pytest.mark.parametrize("which", ["tree", "real"])
def test_json_holds_everything(which, request):
    """Oracle: the objects themselves, built again from the JSON by the schema."""
    loaded = request.getfixturevalue(which)
    document = json.loads(loaded.to_json())
    assert document.keys() == {"categories", "methods", "papers", "frameworks", "survey"}
    kinds = {"categories": Category, "papers": Paper, "frameworks": Framework}
    for name, kind in kinds.items():
        again = [msgspec.convert(value, kind) for value in document[name]]
        assert again == list(getattr(loaded, name).values())
    derived = [{"implemented": value.pop("implemented"), "path": value.pop("path")} for value in document["methods"]]
    methods = [msgspec.convert(value, Method) for value in document["methods"]]
    assert {m.id: m for m in methods} == loaded.methods
    assert ids(methods) == ids(loaded.find())
    assert derived == [{"implemented": m.implemented, "path": m.path} for m in methods]
    assert document["survey"] == loaded.survey


def test_json_is_one_line_of_standard_json(tree):
    text = tree.to_json()
    assert "\n" not in text
    assert "Émile" in text


@pytest.mark.parametrize("which", ["tree", "real"])
def test_records_are_flat_and_complete(which, request):
    """One for each method, the same columns in each, plain values that agree with the objects."""
    loaded = request.getfixturevalue(which)
    records = loaded.to_records()
    assert [r["id"] for r in records] == ids(loaded.find())
    columns = list(records[0])
    assert {"id", "name", "category", "year", "implemented", "summary", "venue", "arxiv", "url"} <= set(columns)
    assert {*Facets.__struct_fields__, *RELATIONS} <= set(columns)
    for record in records:
        m = loaded.methods[record["id"]]
        assert list(record) == columns
        assert all(value is None or isinstance(value, str | int) for value in record.values())
        assert record["builds_on"].split() == m.relations.builds_on
        assert record["stage"].split() == m.facets.stage
        assert (record["training"], record["gqa"]) == (m.facets.training, m.facets.gqa)
        assert (record["year"], record["category"], record["name"]) == (m.year, m.category, m.name)
        assert record["papers"].split() == m.papers
        assert record["arxiv"] == loaded.papers[m.papers[0]].arxiv


def test_one_record_by_hand(tree):
    record = next(r for r in tree.to_records() if r["id"] == "qlora")
    assert record["papers"] == "qlora lora"
    assert (record["combines"], record["composes_with"]) == ("lora rtn", "")
    assert (record["venue"], record["claims"], record["implemented"], record["simulated"]) == (
        "NeurIPS",
        0,
        False,
        False,
    )
