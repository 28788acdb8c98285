"""What is covered, category by category; where the tree has drifted from the survey's list; what is broken."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table

import taxonomy
from refimpl import results
from taxonomy.schema import near

if TYPE_CHECKING:
    from taxonomy import Taxonomy

RESULTS = Path("docs/results/claims.json")
Measured = Mapping[tuple[str, str], object]


@dataclass(frozen=True)
class Row:
    """Coverage of a category and all below it.

    Attributes:
        category: its id, empty for the total.
        oracle: implemented methods whose test names an oracle.
        claims: claims that its methods declare.
        measured: those with a value in the results.
        results: implemented methods that have figures in an arena.
        pages: methods that the docs generator writes a page for; all of them once the taxonomy loads.
        papers: papers filed in it or below.
        papers_implemented: those that an implemented method names.
    """

    category: str
    name: str
    methods: int
    implemented: int
    oracle: int
    claims: int
    measured: int
    results: int
    pages: int
    papers: int
    papers_implemented: int


@dataclass(frozen=True)
class Drift:
    """How the tree differs from the survey's online list.

    Attributes:
        headings: headings of the list that no category stands for.
        papers: (paper, heading) where the list has the paper under a heading, and we file it in no category that stands
            for the heading or is below one that does; a paper with a correction of kind `misfiled` is left out.
        ours_alone: categories that stand for no heading.
    """

    headings: list[str]
    papers: list[tuple[str, str]]
    ours_alone: list[str]


@dataclass(frozen=True)
class Report:
    """Everything that `check` found, categories in reading order."""

    rows: list[Row]
    total: Row
    drift: Drift
    problems: list[str]

    @property
    def share(self) -> float:
        """Implemented methods in percent of all methods; 100 where there are none."""
        return 100 * self.total.implemented / self.total.methods if self.total.methods else 100.0

    def failures(self, minimum: float = 0.0) -> list[str]:
        """What makes a check fail, one line each: the problems, and a coverage below `minimum` percent."""
        if self.share >= minimum:
            return self.problems
        count = f"{self.total.implemented} of {self.total.methods} methods run"
        return [
            *self.problems,
            f"coverage is {self.share:.1f} %, below {minimum:g} % ({count}); implement more or lower --min",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "share": round(self.share, 2)}

    def table(self, depth: int = 2) -> Table:
        """The rows of categories less deep than `depth` and the total, 80 columns wide at most."""
        caption = "methods that run / all · with an oracle · claims measured / declared · with figures · papers implemented / listed"
        table = Table(box=None, pad_edge=False, header_style="bold", width=80, caption=caption, caption_justify="left")
        table.add_column("category", overflow="ellipsis", no_wrap=True, ratio=1)
        for name in ("methods", "oracle", "claims", "results", "pages", "papers"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            level = row.category.count("/")
            if level < depth:
                table.add_row("  " * level + row.name, *_cells(row), style=None if level else "bold")
        table.add_section()
        table.add_row(self.total.name, *_cells(self.total), style="bold")
        return table

    def lines(self, most: int | None = None) -> Iterator[str]:
        """The drift in words, at most so many lines of each kind."""
        drift = self.drift
        yield from _listed("headings of the survey's list that no category stands for", drift.headings, most)
        moved = [f"{paper} (listed under {heading})" for paper, heading in drift.papers]
        yield from _listed("papers filed elsewhere than the survey's list has them", moved, most)
        yield from _listed("categories that are ours alone", drift.ours_alone, most)


def check(tree: "Taxonomy", *, measured: Measured | None = None) -> Report:
    """Count what is covered, compare with the survey's list, and collect everything that is broken.

    Args:
        tree: a loaded taxonomy; `refimpl/`, `tests/` and `docs/` are looked for beside its folder.
        measured: values by (method, claim); read from `docs/results/claims.json` if left out.
    """
    root = tree.root.parent
    problems = [str(problem) for problem in taxonomy.validate(tree.root)]
    if measured is None:
        measured = _results(root / RESULTS, problems)
    problems += _unknown_claims(tree, measured)
    oracles = {m.id for m in tree.methods.values() if m.implemented and _has_oracle(root, m.path, problems)}
    problems += _modules_without_leaf(tree, root)
    problems += _tests_without_leaf(tree, root)
    rows = _rows(tree, oracles, measured, _with_figures(root / RESULTS.parent))
    return Report(rows=rows[:-1], total=rows[-1], drift=_drift(tree), problems=problems)


def _rows(tree: "Taxonomy", oracles: set[str], measured: Measured, figures: set[str]) -> list[Row]:
    """One row for each category in reading order, and the total; each entry counts in all categories above it."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((f.name for f in fields(Row)[2:]), 0))
    for method in tree.methods.values():
        claims = [(method.id, claim.id) in measured for claim in method.claims]
        for place in _above(method.category):
            row = counts[place]
            row["methods"] += 1
            row["pages"] += 1
            row["implemented"] += method.implemented
            row["oracle"] += method.id in oracles
            row["claims"] += len(claims)
            row["measured"] += sum(claims)
            row["results"] += method.implemented and method.id in figures
    running = {key for method in tree.methods.values() if method.implemented for key in method.papers}
    for paper in tree.papers.values():
        for place in {place for category in paper.categories for place in _above(category)}:
            counts[place]["papers"] += 1
            counts[place]["papers_implemented"] += paper.key in running
    names = {**{c.id: c.name for c in tree.categories.values()}, "": "all"}
    return [Row(category=place, name=name, **counts[place]) for place, name in names.items()]


def _above(category: str) -> list[str]:
    """A category, those above it, and the root.

    Examples:
        >>> _above("compression/pruning")
        ['', 'compression', 'compression/pruning']
    """
    parts = category.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts) + 1)]


def _drift(tree: "Taxonomy") -> Drift:
    standing: dict[str, list[str]] = defaultdict(list)
    for category in tree.categories.values():
        for heading in category.survey_path:
            standing[heading].append(category.id)
    papers = [
        (paper.key, heading)
        for paper in tree.papers.values()
        if all(correction.kind != "misfiled" for correction in paper.corrections)
        for heading in paper.listed
        if not any(place in _above(category) for category in paper.categories for place in standing[heading])
    ]
    return Drift(
        headings=[heading for heading in tree.survey if heading not in standing or not standing[heading]],
        papers=papers,
        ours_alone=[category.id for category in tree.categories.values() if not category.survey_path],
    )


def _has_oracle(root: Path, path: str, problems: list[str]) -> bool:
    """Whether the test of an implemented method names an oracle; a test that is missing or unreadable is a problem."""
    test = _mirrored_test(Path(path))
    try:
        module = ast.parse((root / test).read_bytes())
    except FileNotFoundError:
        problems.append(f"{test}: not there, but {path} is implemented; write it")
        return False
    except (OSError, SyntaxError, ValueError) as error:
        problems.append(f"{test}: cannot be read: {error}")
        return False
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(module) if isinstance(node, documented)]
    return any(line.strip().startswith("Oracle:") for text in texts for line in text.splitlines())


def _modules_without_leaf(tree: "Taxonomy", root: Path) -> Iterator[str]:
    """Modules of refimpl/ that neither a leaf nor a test of their own stands for."""
    leaves = {method.path for method in tree.methods.values()}
    for module in sorted((root / "refimpl").rglob("*.py")):
        path = module.relative_to(root / "refimpl").with_suffix("")
        if path.name in ("__init__", "protocol") or path.as_posix() in leaves:
            continue
        if not (root / _mirrored_test(path)).exists():
            yield f"refimpl/{path}.py: neither taxonomy/{path}.yaml nor {_mirrored_test(path)} is there; write one of them"


def _tests_without_leaf(tree: "Taxonomy", root: Path) -> Iterator[str]:
    """Tests in a category's folder that neither a leaf nor a module of refimpl/ stands for."""
    leaves = {method.path for method in tree.methods.values()}
    for category in tree.categories:
        for test in sorted((root / "tests" / category).glob("test_*.py")):
            path = f"{category}/{test.stem.removeprefix('test_')}"
            if path not in leaves and not (root / "refimpl" / f"{path}.py").exists():
                yield f"tests/{category}/{test.name}: neither taxonomy/{path}.yaml nor refimpl/{path}.py is there; rename or remove it"


def _mirrored_test(path: Path) -> Path:
    return Path("tests", path.parent, f"test_{path.name}.py")


class _Measurement(msgspec.Struct):
    method: str
    claim: str
    value: float | None = None


class _Results(msgspec.Struct):
    claims: list[_Measurement]


def _results(path: Path, problems: list[str]) -> Measured:
    """Measured values of the committed results; none where there are no results yet."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=_Results)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        problems.append(f"{RESULTS}: cannot be read: {error}; `effllm claims` writes it")
        return {}
    return {(c.method, c.claim): c.value for c in results.claims if c.value is not None}


def _with_figures(folder: Path) -> set[str]:
    """Methods with a finished row in a stored arena."""
    documents = results.documents([folder])
    return {row["method"] for d in documents.values() for row in d.get("rows", []) if not row.get("error")}


def _unknown_claims(tree: "Taxonomy", measured: Measured) -> Iterator[str]:
    declared = {(method.id, claim.id) for method in tree.methods.values() for claim in method.claims}
    for method, claim in measured:
        if (method, claim) not in declared:
            hint = near(f"{method}/{claim}", (f"{m}/{c}" for m, c in declared))
            yield f"{RESULTS}: unknown claim '{method}/{claim}'{hint or '; measure again, or declare it in the method'}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.implemented}/{row.methods}",
        str(row.oracle),
        f"{row.measured}/{row.claims}",
        str(row.results),
        str(row.pages),
        f"{row.papers_implemented}/{row.papers}",
    )


def _listed(title: str, items: Iterable[str], most: int | None) -> Iterator[str]:
    items = list(items)
    if items:
        yield f"{title}: {len(items)}"
        yield from (f"  {item}" for item in items[:most])
        if most is not None and len(items) > most:
            yield f"  … and {len(items) - most} more (--all)"
