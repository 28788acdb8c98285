"""Graphs and trees made up for the tests, so that they hold whatever the real taxonomy says."""

import random

import msgspec
import networkx
import pytest

from taxonomy.query import Taxonomy
from taxonomy.schema import (
    RELATIONS,
    Category,
    Claim,
    Compiled,
    Correction,
    Expect,
    Facets,
    Method,
    Paper,
    Relations,
    Source,
)

FACETS = Facets(
    stage=["decode"], training="none", calibration=False, exact=True, frees_memory=True, changes_architecture=False
)
PROSE = "Long enough to be prose for the schema's sake, and no longer than that."


def category(id, order=1, survey_path=()):
    name = f"Category {id.replace('/', ' of ')}"
    return Category(id=id, name=name, summary="S.", text=PROSE * 5, order=order, survey_path=list(survey_path))


def method(id, place, year=2020, relations=None, impl=None, papers=(), claims=(), name=None):
    return Method(
        id=id,
        name=name or id.upper(),
        category=place,
        year=year,
        summary=f"What {id} does.",
        papers=list(papers) or ["p"],
        idea=PROSE,
        when=PROSE,
        facets=FACETS,
        relations=Relations(**(relations or {})),
        impl=impl,
        claims=[
            Claim(
                id=c,
                says="It holds.",
                source=Source(paper="p", where="Table 1"),
                expect=Expect(unit="ratio", above=0.0),
            )
            for c in claims
        ],
    )


def paper(key, places, year=2020, listed=(), kinds=()):
    corrections = [Correction(kind=kind) for kind in kinds]
    return Paper(
        key=key,
        title=f"The paper called {key}",
        venue="arXiv",
        url="https://example.org/",
        year=year,
        categories=list(places),
        listed=list(listed),
        corrections=corrections,
    )


def forest(root, categories, methods, papers, survey=None):
    """A Taxonomy of these entries, without files."""
    compiled = Compiled(
        categories={c.id: c for c in categories},
        methods={m.id: m for m in methods},
        papers={p.key: p for p in papers},
        frameworks={},
        survey=survey or {},
    )
    return Taxonomy(root, compiled)


def grown(root, methods, papers=0, seed=0):
    """A random taxonomy of about the real one's shape: families, categories two or three deep, names of many lengths."""
    rng = random.Random(seed)
    words = [
        "low-rank",
        "Quantization",
        "of",
        "attention",
        "KV",
        "(IA)³",
        "with",
        "memory",
        "W",
        "illumination",
        "Möbius",
    ]
    categories = []
    for a in range(max(1, methods // 30) + 1):
        categories.append(category(f"f{a}"))
        for b in range(rng.randint(0, 4)):
            categories.append(category(f"f{a}/g{b}"))
            categories += [category(f"f{a}/g{b}/h{c}") for c in range(rng.choice([0, 0, 2, 3]))]
    categories = [
        msgspec.structs.replace(c, name=" ".join(rng.choices(words, k=rng.randint(1, 6)))) for c in categories
    ]
    parents = {c.parent for c in categories}
    places = [c.id for c in categories if c.id not in parents or rng.random() < 0.2]
    entries = []
    for i in range(methods):
        relations = {}
        for _ in range(rng.randint(0, 3) if i else 0):
            relations.setdefault(rng.choice(RELATIONS), set()).add(f"m{rng.randrange(i)}")
        entries.append(
            method(
                f"m{i}",
                rng.choice(places),
                year=2013 + int(11 * (i / methods) ** 0.5) - rng.randint(0, 1),
                relations={kind: sorted(targets) for kind, targets in relations.items()},
                impl="It" if rng.random() < 0.5 else None,
                papers=[f"p{rng.randrange(papers)}"] if papers else (),
                name=" ".join(rng.choices(words, k=rng.randint(1, 4))) + f" {i}",
            )
        )
    listed = [paper(f"p{i}", [rng.choice(places)], year=2015 + i % 10) for i in range(papers)]
    return forest(root, categories, entries, listed or [paper("p", places[:1])])


@pytest.fixture
def make_forest(tmp_path):
    """`make_forest(categories, methods, papers, survey)` with a root in a temporary folder."""
    (tmp_path / "taxonomy").mkdir()
    return lambda *entries, **more: forest(tmp_path / "taxonomy", *entries, **more)


@pytest.fixture
def grow(tmp_path):
    """`grow(methods, papers, seed)`: a random taxonomy."""
    return lambda methods, papers=0, seed=0: grown(tmp_path / "taxonomy", methods, papers, seed)


@pytest.fixture
def entries():
    """Makers of single entries, by name."""
    from types import SimpleNamespace

    return SimpleNamespace(category=category, method=method, paper=paper)


@pytest.fixture
def awkward():
    """A graph whose texts hold what every format has to escape."""
    graph = networkx.MultiDiGraph()
    names = ['<b>&"A"</b>', "a]b|c{d}", "back\\slash\\N `tick` #35;", "tab\tbell\x07 end", "Ωmega – (IA)³ 注意"]
    for i, name in enumerate(names):
        graph.add_node(f"n{i}", kind="method", name=name, year=2020 + i % 2, category="x", implemented=i % 2 == 0)
    graph.add_node("category:x", kind="category", name='X & "co" <y>', summary="a\nb")
    graph.add_node("paper:n0", kind="paper", name="]]>", year=2021, note=None)
    for i in range(4):
        graph.add_edge(f"n{i + 1}", f"n{i}", relation=RELATIONS[i])
    graph.add_edge("n1", "n0", relation="composes_with")
    for i in range(5):
        graph.add_edge(f"n{i}", "category:x", relation="in")
    graph.add_edge("n0", "paper:n0", relation="described_by")
    graph.add_edge("paper:n0", "category:x", relation="filed_under")
    return graph
