"""Write the site's pages: `python -m tools.docs`.

Everything the builders read comes to stand in `build/docs`: the hand-written pages of `docs/`, and a page for each category,
method, framework and arena, the papers, the claims and the graph, made from the taxonomy, the docstrings and the stored
results. Only what changed is written, what is no longer made is removed, and the same input gives the same bytes.
"""

import ast
import csv
import io
import json
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import plotly
from markupsafe import Markup

import taxonomy
from refimpl import plots, results
from refimpl.views import sheets
from taxonomy import Category, Claim, Facets, Framework, InvalidTaxonomy, Method, Taxonomy
from taxonomy import graph as graphs
from tools import findings
from tools.break_even import break_even

ROOT = Path(__file__).parents[1]
LONG_CONTEXT = "long_context"  # the arena that is held against a published benchmark
MIXERS = "architecture/alternatives"  # category of those that stand in the place of attention
SURVEY = "survey"  # folder of the generated tree, and name of its tab
PROTECTED = re.compile(r"(\$\$.+?\$\$|\$[^$]+\$|```.+?```|`[^`]+`)", re.DOTALL)


def main() -> None:
    """Write `build/docs`, say what changed, and exit with 1 if the taxonomy cannot be used."""
    try:
        site = Site(ROOT, ROOT / "build" / "docs", taxonomy.load(), results.for_site())
    except InvalidTaxonomy as error:
        sys.exit(f"{error}\n{len(error.problems)} problems; no page was written")
    site.write_all()
    sys.stdout.write(f"{len(site.kept)} files in {site.out.relative_to(ROOT)}: {site.summary()}\n")


@dataclass
class Site:
    """One run of the generator.

    Attributes:
        root: the checkout, with `docs/`, `tests/` and `refimpl/`.
        out: folder to write.
        tree: the taxonomy.
        documents: stored results by name, as `refimpl.results.documents` gives them.
    """

    root: Path
    out: Path
    tree: Taxonomy
    documents: Mapping[str, dict[str, Any]]
    kept: dict[str, str] = field(default_factory=dict)

    def write_all(self) -> None:
        """Write every page, and remove what no page stands for any more."""
        self.measured = {(r["method"], r["claim"]): r for r in self.documents.get("claims", {}).get("claims", [])}
        self.templates = _templates(self)
        self._copy_hand_written()
        self._tree()
        for category in self.tree.categories.values():
            self._category(category)
        for method in self.tree.methods.values():
            self._method(method)
        for framework in self.tree.frameworks.values():
            self.page(page_of(framework), "framework.md.j2", framework=framework, papers=[])
        self._papers()
        self._graph()
        self._results()
        self._exports()
        self._remove_stale()

    def put(self, path: str, content: str | bytes) -> None:
        """Write a file if its content is not there already."""
        data = content.encode() if isinstance(content, str) else content
        target = self.out / path
        before = target.read_bytes() if target.is_file() else None
        if before != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.kept[path] = "new" if before is None else "same" if before == data else "changed"

    def page(self, path: str, template: str, **values: Any) -> None:
        """Render a template to a page; in it, `link(target)` is relative to the page."""
        render = self.templates.get_template(template).render
        text = render(**values, link=partial(_link, path), href=partial(_href, path), page=path)
        self.put(path, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")

    def summary(self) -> str:
        """How many files are new, changed and as before."""
        states = list(self.kept.values())
        return ", ".join(f"{states.count(state)} {state}" for state in ("new", "changed", "same"))

    def papers_below(self, category: str) -> int:
        """How many papers are filed in a category or below it."""
        inside = (any(f"{c}/".startswith(f"{category}/") for c in p.categories) for p in self.tree.papers.values())
        return sum(inside)

    def holds(self, category: Category) -> str:
        """What a category without methods holds, in words."""
        frameworks = sum(f"{f.category}/".startswith(f"{category.id}/") for f in self.tree.frameworks.values())
        counts = {"framework": frameworks, "paper": self.papers_below(category.id)}
        return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n)

    def tables_for(self, methods: Sequence[Method]) -> list[dict[str, Any]]:
        """The arenas in which these methods have figures."""
        names = dict.fromkeys(name for m in methods for name in m.arena if name in self.documents)
        return [_table(self.documents[name], {m.id for m in methods}, most=3) for name in names]

    def elsewhere(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """Methods that were measured in another environment than the document's, with theirs; each environment once."""
        found: dict[str, dict[str, None]] = {}
        for row in rows:
            if row.get("environment"):
                found.setdefault(json.dumps(row["environment"]), {})[row["method"]] = None
        return [(", ".join(methods), json.loads(own)) for own, methods in found.items()]

    def peers(self) -> list[dict[str, Any]]:
        """Methods beside other projects' implementations, as `python -m tools.peers` measured them."""
        rows: list[dict[str, Any]] = self.documents.get("peers", {}).get("peers", [])
        return rows

    def claim(self, name: str) -> tuple[Method, Claim]:
        """A claim by its full name, `wanda/rows-beat-layers`, and its method."""
        method, _, claim = name.partition("/")
        return self.tree.methods[method], next(c for c in self.tree.methods[method].claims if c.id == claim)

    def facet(self, method: Method, name: str) -> Any:
        """One facet of a method."""
        return getattr(method.facets, name)

    def test_path(self, method: Method) -> str:
        """Where its tests stand."""
        return f"tests/{_test_path(method)}"

    def _copy_hand_written(self) -> None:
        for path in sorted((self.root / "docs").rglob("*")):
            name = path.relative_to(self.root / "docs").as_posix()
            if path.is_file() and not name.startswith("results/") and path.suffix != ".j2":
                self.put(name, path.read_bytes())
        self.page("index.md", "home.md.j2", picture=self._picture("index.md", graphs.select(self.tree), "radial"))
        self.put(
            ".nav.yml",
            "nav:\n- Home: index.md\n- survey\n- graph.md\n- papers.md\n- results\n- guide\n- design.md\n",
        )

    def _tree(self) -> None:
        self.page("survey/index.md", "tree.md.j2")
        self.put("survey/.nav.yml", _yaml_nav("Survey", ["index.md", *(c.id for c in self.tree.children(None))]))

    def _category(self, category: Category) -> None:
        path = page_of(category)
        methods = self.tree.find(category=category.id)
        drawn = graphs.select(self.tree, category=category.id)
        self.page(
            path,
            "category.md.j2",
            category=category,
            children=self.tree.children(category.id),
            methods=methods,
            here=[m for m in methods if m.category == category.id],
            frameworks=[f for f in self.tree.frameworks.values() if f.category == category.id],
            papers=self.tree.reading_list(category.id),
            picture=self._picture(path, drawn, "auto" if category.depth else "radial") if len(methods) > 1 else None,
        )
        order = [f"{c.id.rpartition('/')[2]}" for c in self.tree.children(category.id)]
        order += [Path(page_of(m)).name for m in methods if m.category == category.id]
        order += sorted(Path(page_of(f)).name for f in self.tree.frameworks.values() if f.category == category.id)
        folder = posixpath.dirname(path)
        self.put(f"{folder}/.nav.yml", _yaml_nav(category.name, ["index.md", *order]))

    def _method(self, method: Method) -> None:
        path = page_of(method)
        around = graphs.select(self.tree, around=method.id, depth=1)
        rivals = {m.id for m in self.tree.find(category=method.category)}
        self.page(
            path,
            "method.md.j2",
            method=method,
            category=self.tree.categories[method.category],
            papers=[self.tree.papers[key] for key in method.papers],
            picture=self._picture(path, around, "layered") if around.number_of_nodes() > 1 else None,
            oracles=oracles(self.root / "tests" / _test_path(method)) if method.implemented else [],
            tables=[_table(self.documents[a], rivals | {method.id}, 3) for a in method.arena if a in self.documents],
            peers=[row for row in self.peers() if row["method"] == method.id],
        )

    def _papers(self) -> None:
        papers = sorted(self.tree.papers.values(), key=lambda p: (-p.year, p.title.casefold()))
        used = {key: m for m in self.tree.methods.values() for key in m.papers}
        self.page("papers.md", "papers.md.j2", papers=papers, used=used, venues=sorted({p.venue for p in papers}))

    def _graph(self) -> None:
        whole = graphs.select(self.tree, papers=False)
        self.page(
            "graph.md", "graph.md.j2", picture=self._picture("graph.md", whole, "radial"), relations=graphs.RELATIONS
        )

    def _results(self) -> None:
        claims = [(m, c) for m in self.tree.find() for c in m.claims]
        self.page(
            "results/claims.md",
            "claims.md.j2",
            claims=claims,
            stamp=self.documents.get("claims", {}).get("environment"),
        )
        self.page(
            "results/peers.md",
            "peers.md.j2",
            rows=self.peers(),
            stamp=self.documents.get("peers", {}).get("environment"),
        )
        arenas = {name: d for name, d in self.documents.items() if "arena" in d}
        for name, document in arenas.items():
            methods = {row["method"] for row in document["rows"]}
            mixers = [m for i in sorted(methods) if (m := self.tree.methods.get(i)) and m.category.startswith(MIXERS)]
            self.page(
                f"results/{name}.md",
                "arena.md.j2",
                document=document,
                table=_table(document, methods),
                name=name,
                figures=plots.figures(document),
                rivals={row: said for row in sorted(methods) if (said := rival(self.root, row))},
                break_even=break_even(document),
                roofline=plots.roofline(document),
                findings=findings.answers(document) if name == LONG_CONTEXT else [],
                beside=findings.side_by_side(document) if name == LONG_CONTEXT else [],
                published=findings.read() if name == LONG_CONTEXT else {},
                learnt=findings.learnt({m.id: self.root / "refimpl" / f"{m.path}.safetensors" for m in mixers})
                if name == LONG_CONTEXT
                else {},
            )
            self.put(f"results/{name}.json", json.dumps(document, indent=1) + "\n")
            self.put(f"results/{name}.csv", results.csv_text(document))
        scaling = self.documents.get("scaling")
        self.page("results/index.md", "results.md.j2", arenas=arenas, claims=claims, scaling=scaling)
        self.put(
            "results/.nav.yml",
            _yaml_nav("Results", ["index.md", "claims.md", "peers.md", *(f"{name}.md" for name in arenas)]),
        )
        if arenas:
            source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
            self.put("assets/plotly.min.js", source.read_bytes())

    def _exports(self) -> None:
        self.put("data/taxonomy.json", self.tree.to_json())
        self.put("data/papers.bib", self.tree.bibtex())
        self.put("data/papers.csv", _papers_csv(self.tree.papers.values()))
        self.put("data/methods.csv", _records_csv(self.tree.to_records()))
        self.put("data/graph.graphml", graphs.render(graphs.select(self.tree, papers=True), "graphml"))
        for name, schema in taxonomy.json_schemas().items():
            self.put(f"data/schema/{name}.json", json.dumps(schema, indent=1) + "\n")

    def _picture(self, page: str, graph: Any, layout: graphs.LayoutName) -> Markup:
        def link(node: str) -> str:
            kind, _, key = node.rpartition(":")
            if kind == "category":
                return _href(page, page_of(self.tree.categories[key]))
            if kind == "paper":
                return _href(page, f"papers.md#{key}")
            return _href(page, page_of(self.tree.methods[node]))

        svg = graphs.render(graph, "svg", layout=layout, link=link)
        one_line = re.sub(r">\s+<", "><", re.sub(r"\s*\n\s*", " ", svg))
        width = re.search(r'width="([\d.]+)"', one_line)
        size = f' style="--natural: {width[1]}px"' if width else ""
        return Markup(f'<div class="graph"{size}>{one_line}</div>')  # noqa: S704 - the renderer escapes every text

    def _remove_stale(self) -> None:
        for path in sorted(self.out.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.out).as_posix() not in self.kept:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def page_of(entry: Category | Method | Framework) -> str:
    """Path of an entry's page below the docs folder."""
    if isinstance(entry, Category):
        return f"{SURVEY}/{entry.id}/index.md"
    name = entry.id.replace("-", "_")
    return f"{SURVEY}/{entry.category}/{name}.md"


def safe(text: str | None) -> Markup:
    """Text of a YAML file as Markdown that carries no HTML, no attribute list and no link; formulas and code stay as they are."""
    parts = PROTECTED.split(text or "")
    clean = [part if i % 2 else _neutral(part) for i, part in enumerate(parts)]
    return Markup("".join(clean))  # noqa: S704 - that is what this function is for


def _neutral(text: str) -> str:
    return re.sub(r"([\[\]{}])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def oracles(test: Path) -> list[str]:
    """What a test file holds its method against: the docstrings that begin with `Oracle:`, without that word."""
    if not test.is_file():
        return []
    functions = [n for n in ast.walk(ast.parse(test.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    texts = [" ".join((ast.get_docstring(f) or "").split()) for f in functions]
    return [text.removeprefix("Oracle:").strip() for text in texts if text.startswith("Oracle:")]


def rival(root: Path, name: str) -> str:
    """What stands behind a row `module:Class` that a module of this checkout has brought in: its docstring's first line, else nothing."""
    module, colon, _ = name.partition(":")
    file = root / f"{module.replace('.', '/')}.py"
    if not colon or not file.is_file():
        return ""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _templates(site: Site) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["safe_md"] = safe
    environment.filters["cell"] = lambda text: Markup(safe(text).replace("|", "\\|").replace("\n", " "))  # noqa: S704
    environment.filters["facet"] = _facet
    environment.globals |= {
        "tree": site.tree,
        "page_of": page_of,
        "facets": Facets.__struct_fields__,
        "measured": site.measured,
        "site": site,
        "zip": zip,
        "covered": lambda methods: sum(m.implemented for m in methods),
    }
    return environment


def _facet(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return (
        {True: "yes", False: "no", None: "–"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
    )


def _link(page: str, target: str) -> str:
    """Target as a Markdown link from a page: a relative path to a source file, which the builders check."""
    path, hash_sign, anchor = target.partition("#")
    return posixpath.relpath(path, posixpath.dirname(page) or ".") + hash_sign + anchor


def _href(page: str, target: str) -> str:
    """Target as it will be called in the built site, for raw HTML, which the builders leave alone."""
    return re.sub(r"\.md(?=#|$)", ".html", _link(page, target))


def _test_path(method: Method) -> str:
    folder, _, name = method.path.rpartition("/")
    return f"{folder}/test_{name}.py"


def _yaml_nav(title: str, entries: Sequence[str]) -> str:
    lines = [f"title: {json.dumps(title, ensure_ascii=False)}", "nav:"]
    return "\n".join([*lines, *(f"- {entry}" for entry in entries)]) + "\n"


def _table(document: dict[str, Any], methods: set[str], most: int | None = None) -> dict[str, Any]:
    """An arena's figures of some methods, as the tables that the terminal shows; `most` leaves out those of later metrics."""
    return {"document": document, "sheets": sheets(document, methods)[:most]}


def _papers_csv(papers: Any) -> str:
    return _records_csv(
        [
            {
                k: " ".join(v) if isinstance(v, list) and all(isinstance(i, str) for i in v) else v
                for k, v in msgspec.to_builtins(p).items()
                if k not in ("corrections", "evidence")
            }
            for p in papers
        ]
    )


def _records_csv(records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    write = csv.DictWriter(text, names, lineterminator="\n")
    write.writeheader()
    write.writerows(records)
    return text.getvalue()


if __name__ == "__main__":
    main()
