"""The query API: a loaded taxonomy, searched, filtered, exported."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec

from taxonomy.schema import RELATIONS, Category, Compiled, Facets, Framework, Method, Paper, near

if TYPE_CHECKING:
    import networkx


JOURNALS = ("AI Open", "JMLR", "Psychometrika", "TACL", "TMLR", "VLDB")
UNREVIEWED = ("arXiv", "Blog", "GitHub", "Website")
SEEN_FROM_THERE = {"builds_on": "built on by", "generalizes": "special case of", "combines": "part of"}


class Taxonomy:
    """Categories, methods, papers and frameworks by id; read-only.

    Attributes:
        categories: by path, in reading order (`compression`, `compression/quantization`, …).
        methods: by id (`gptq`).
        papers: by bibliography key.
        frameworks: by id.
        survey: headings of the survey's online list, path to title.
    """

    def __init__(self, root: Path, compiled: Compiled) -> None:
        self.root = root
        self.categories: Mapping[str, Category] = MappingProxyType(compiled.categories)
        self.methods: Mapping[str, Method] = MappingProxyType(compiled.methods)
        self.papers: Mapping[str, Paper] = MappingProxyType(compiled.papers)
        self.frameworks: Mapping[str, Framework] = MappingProxyType(compiled.frameworks)
        self.survey: Mapping[str, str] = MappingProxyType(compiled.survey)

    def __repr__(self) -> str:
        ready = sum(m.implemented for m in self.methods.values())
        return (
            f"<Taxonomy: {len(self.categories)} categories, {len(self.methods)} methods ({ready} run), "
            f"{len(self.papers)} papers>"
        )

    def find(
        self,
        text: str | None = None,
        *,
        category: str | None = None,
        tag: str | None = None,
        year: int | None = None,
        venue: str | None = None,
        implemented: bool | None = None,
        relation: str | None = None,
        facets: Mapping[str, object] | None = None,
    ) -> list[Method]:
        """Methods that meet every condition given, best match for `text` first, else in reading order.

        Args:
            text: words that must all occur in id, name, tags, categories, summary, idea, advice or papers' titles.
            category: a category's id; those below it count too.
            tag: one tag.
            year: year in which the method's first paper appeared.
            venue: venue of one of its papers, any case.
            implemented: True for what runs, False for what does not yet.
            relation: `builds_on` (has such an edge) or `builds_on:gptq` (has it to that method).
            facets: facet to value; for a facet that is a list, the value must be in it.

        Raises:
            ValueError: a category, relation, method of a relation, facet or value of a facet that does not exist.
        """
        if category is not None and category not in self.categories:
            raise ValueError(_unknown("category", category, self.categories))
        kind, _, target = (relation or "").partition(":")
        if relation is not None and kind not in RELATIONS:
            raise ValueError(_unknown("relation", kind, RELATIONS))
        if target and target not in self.methods:
            raise ValueError(_unknown("method", target, self.methods))
        for name, value in (facets or {}).items():
            _check_facet(name, value)
        found = [
            m
            for m in self._in_order()
            if (category is None or f"{m.category}/".startswith(f"{category}/"))
            and (tag is None or tag in m.tags)
            and (year is None or m.year == year)
            and (venue is None or any(self.papers[k].venue.casefold() == venue.casefold() for k in m.papers))
            and (implemented is None or m.implemented == implemented)
            and (relation is None or any(k == kind and target in ("", t) for k, t in m.relations.items()))
            and all(_has_facet(m.facets, name, value) for name, value in (facets or {}).items())
        ]
        words = (text or "").casefold().split()
        if not words:
            return found
        scored = [(min(self._score(m, word) for word in words), m) for m in found]
        phrase = " ".join(words)
        ranked = sorted(scored, key=lambda pair: -pair[0] - self._score(pair[1], phrase))
        return [m for score, m in ranked if score]

    def _in_order(self) -> list[Method]:
        position = {c: i for i, c in enumerate(self.categories)}
        return sorted(self.methods.values(), key=lambda m: (position.get(m.category, 0), m.year, m.id))

    def _score(self, method: Method, word: str) -> int:
        """How well a word fits: 6 for the whole id, 5 for the whole name, down to 1 for the text and 0 for nowhere."""
        titles = " ".join(self.papers[key].title for key in method.papers)
        parts = method.category.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        places = " / ".join(self.categories[c].name for c in above if c in self.categories)
        fields = (
            f"{method.id} {method.name}",
            f"{' '.join(method.tags)} / {places}",
            f"{method.summary} {titles}",
            f"{method.idea} {method.when}",
        )
        if word in (method.id, method.name.casefold()):
            return 6 if word == method.id else 5
        return max((4 - i for i, value in enumerate(fields) if word in value.casefold()), default=0)

    def children(self, category: str | None) -> list[Category]:
        """Categories directly below one, in reading order; those on top for None."""
        return [c for c in self.categories.values() if c.parent == category]

    def reading_list(self, category: str) -> list[Paper]:
        """Papers filed directly in a category, newest first."""
        return sorted(
            (p for p in self.papers.values() if category in p.categories), key=lambda p: (-p.year, p.title.casefold())
        )

    def related_to(self, method: str) -> list[tuple[str, Method]]:
        """Edges that point at a method, as (relation, the method it comes from)."""
        return [(kind, m) for m in self.methods.values() for kind, target in m.relations.items() if target == method]

    def relations_of(self, method: str) -> dict[str, list[Method]]:
        """A method's neighbours as a reader would name them, both directions together (`builds on`, `built on by`)."""
        named: dict[str, list[Method]] = {}
        for kind, target in self.methods[method].relations.items():
            named.setdefault(kind.replace("_", " "), []).append(self.methods[target])
        for kind, other in self.related_to(method):
            named.setdefault(SEEN_FROM_THERE.get(kind, kind.replace("_", " ")), []).append(other)
        order = [name for kind in RELATIONS for name in (kind.replace("_", " "), SEEN_FROM_THERE.get(kind))]
        return {name: sorted(named[name], key=lambda m: (m.year, m.id)) for name in order if name in named}

    def graph(self) -> "networkx.MultiDiGraph[str]":
        """Everything as a graph.

        Nodes are categories, methods and papers, each with `kind` and `name`; methods also with `year`, `category` and
        `implemented`. Edges carry `relation`: the typed ones between methods, `in` from a method or category to the
        category above, `described_by` from a method to its papers, `filed_under` from a paper to its categories. Ids of
        papers and categories are prefixed (`paper:gptq`, `category:compression`), since a method may share a paper's key.
        """
        import networkx

        graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph()
        for c in self.categories.values():
            graph.add_node(f"category:{c.id}", kind="category", name=c.name)
        for p in self.papers.values():
            graph.add_node(f"paper:{p.key}", kind="paper", name=p.name or p.title, year=p.year)
        for m in self.methods.values():
            graph.add_node(
                m.id, kind="method", name=m.name, year=m.year, category=m.category, implemented=m.implemented
            )
        for c in self.categories.values():
            if c.parent:
                graph.add_edge(f"category:{c.id}", f"category:{c.parent}", relation="in")
        for p in self.papers.values():
            graph.add_edges_from((f"paper:{p.key}", f"category:{c}", {"relation": "filed_under"}) for c in p.categories)
        for m in self.methods.values():
            graph.add_edge(m.id, f"category:{m.category}", relation="in")
            graph.add_edges_from((m.id, f"paper:{key}", {"relation": "described_by"}) for key in m.papers)
            graph.add_edges_from((m.id, target, {"relation": kind}) for kind, target in m.relations.items())
        return graph

    def bibtex(self, papers: str | Paper | Method | Iterable[str | Paper | Method] | None = None) -> str:
        """BibTeX of papers, by key or object, or of a method's papers; of all of them if left out.

        Raises:
            KeyError: a key that is not in the bibliography.
        """
        chosen: dict[str, Paper] = {}
        if isinstance(papers, str | Paper | Method):
            papers = [papers]
        for item in self.papers.values() if papers is None else papers:
            keys = item.papers if isinstance(item, Method) else [item.key if isinstance(item, Paper) else item]
            for key in keys:
                if key not in self.papers:
                    raise KeyError(_unknown("paper", key, self.papers))
                chosen[key] = self.papers[key]
        return "\n".join(_bibtex(paper) for paper in chosen.values())

    def to_json(self) -> str:
        """Everything as one JSON text, with the fields of the schema."""
        return msgspec.json.encode(
            {
                "categories": list(self.categories.values()),
                "methods": [self.as_dict(m) for m in self._in_order()],
                "papers": list(self.papers.values()),
                "frameworks": list(self.frameworks.values()),
                "survey": dict(self.survey),
            }
        ).decode()

    def as_dict(self, method: Method) -> dict[str, Any]:
        """A method as plain values, derived fields included."""
        return {**msgspec.to_builtins(method), "implemented": method.implemented, "path": method.path}

    def to_records(self) -> list[dict[str, Any]]:
        """One flat dict per method, ready for a data frame: facets and relations become columns, lists become text."""
        records = []
        for m in self._in_order():
            first = self.papers[m.papers[0]]
            record: dict[str, Any] = {
                "id": m.id,
                "name": m.name,
                "category": m.category,
                "year": m.year,
                "implemented": m.implemented,
                "simulated": m.simulated,
                "summary": m.summary,
                "tags": " ".join(m.tags),
                "papers": " ".join(m.papers),
                "venue": first.venue,
                "arxiv": first.arxiv,
                "url": first.url,
                "code": first.code,
                "claims": len(m.claims),
            }
            for name in Facets.__struct_fields__:
                value = getattr(m.facets, name)
                record[name] = " ".join(value) if isinstance(value, list) else value
            record |= {kind: " ".join(getattr(m.relations, kind)) for kind in RELATIONS}
            records.append(record)
        return records


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"unknown {kind} {name!r}" + (
        near(name, known) or (f"; known: {', '.join(known)}" if len(known) < 12 else "")
    )


def _check_facet(name: str, value: object) -> None:
    if name not in Facets.__struct_fields__:
        raise ValueError(_unknown("facet", name, Facets.__struct_fields__))
    kind = next(f.type for f in msgspec.structs.fields(Facets) if f.name == name)
    try:
        msgspec.convert([value] if name == "stage" else value, kind)
    except msgspec.ValidationError:
        raise ValueError(f"facet {name!r} is never {value!r}; it is one of {', '.join(_values(kind))}") from None


def _values(kind: Any) -> list[str]:
    """What a facet may be, in the words of the command line."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    words = {bool: ["yes", "no"], type(None): ["null"]}
    return words[kind] if kind in words else [word for part in get_args(kind) for word in _values(part)]


def _has_facet(facets: Facets, name: str, value: object) -> bool:
    have = getattr(facets, name)
    return value in have if isinstance(have, list) else have == value


SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_"}
    | {"{": r"\textbraceleft{}", "}": r"\textbraceright{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def _bibtex(paper: Paper) -> str:
    """One entry; capitals of the title are protected, and what is unknown is left out."""
    words = re.split(r"(\S*[A-Z]\S*)", paper.title)  # the odd ones have capitals
    escaped = [word.translate(SPECIAL) for word in words]
    fields = {"title": "".join(f"{{{word}}}" if i % 2 else word for i, word in enumerate(escaped))}
    if paper.authors:
        fields["author"] = " and ".join(author.translate(SPECIAL) for author in paper.authors)
    fields["year"] = str(paper.year)
    kind, place = ("misc", None) if paper.venue in UNREVIEWED else ("inproceedings", "booktitle")
    if paper.venue in JOURNALS:
        kind, place = "article", "journal"
    if place:
        fields[place] = paper.venue.translate(SPECIAL)
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    fields["url"] = paper.url
    body = "".join(f"  {name:<13} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{paper.key},\n{body}}}\n"
