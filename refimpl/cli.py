"""The command `effllm`. What needs no torch does not import it."""

import csv
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer
from rich.console import Console

import taxonomy
from refimpl.results import CHECKOUT
from taxonomy import Facets, InvalidTaxonomy, Method, Taxonomy
from taxonomy.schema import near

app = typer.Typer(
    name="effllm",
    help="The executable survey of efficient large language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Category = Annotated[str | None, typer.Option("--category", "-c", help="Only this category and those below it.")]


class Refused(Exception):
    """Something the user can mend; its message is all that is shown."""


def main() -> None:
    """Entry point of `effllm`."""
    run_app(app)


def run_app(commands: typer.Typer) -> None:
    """Run commands so that every failure is one line and an exit code, never a traceback."""
    try:
        try:
            commands()
        finally:
            sys.stdout.flush()
    except InvalidTaxonomy as error:
        for problem in error.problems[:10]:
            err.print(str(problem), markup=False)
        err.print(f"[red]error:[/] {len(error.problems)} problems in the taxonomy; `effllm check` lists all of them")
        sys.exit(1)
    except BrokenPipeError:  # who read the output has gone, as `head` does; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Refused, ValueError, KeyError, OSError, NotImplementedError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        err.print("[red]error:[/]", end=" ")
        err.print(str(text), markup=False)
        sys.exit(1)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="effllm-", suffix=".txt", delete=False) as report:
            traceback.print_exc(file=report)
        err.print(f"[red]error:[/] this is a fault of effllm ({type(error).__name__}); please report {report.name}")
        sys.exit(70)


def _json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _method(tree: Taxonomy, name: str) -> Method:
    name = name.replace("_", "-").lower()
    if name not in tree.methods:
        raise Refused(f"unknown method {name!r}{near(name, tree.methods)} (`effllm tree` lists all)")
    return tree.methods[name]


def _known_category(tree: Taxonomy, name: str | None) -> str | None:
    if name is not None and (name := name.strip("/")) not in tree.categories:
        last = {c.rpartition("/")[2]: c for c in tree.categories}
        guess = f"; did you mean {last[name]!r}?" if name in last else near(name, tree.categories)
        raise Refused(f"unknown category {name!r}{guess} (`effllm tree --depth 2` lists them)")
    return name


@app.command()
def tree(
    category: Annotated[str | None, typer.Argument(help="Show this part only.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Levels to show.")] = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Only what runs.")] = False,
    as_json: Json = False,
) -> None:
    """The tree of categories and methods."""
    from refimpl.views import tree_view

    loaded = taxonomy.load()
    category = _known_category(loaded, category)
    methods = loaded.find(category=category, implemented=True if implemented else None)
    if as_json:
        inside = [c for c in loaded.categories.values() if category is None or f"{c.id}/".startswith(f"{category}/")]
        _json({"categories": msgspec.to_builtins(inside), "methods": [loaded.as_dict(m) for m in methods]})
    else:
        out.print(tree_view(loaded, category, depth, {m.id for m in methods} if implemented else None))


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="A method, as `gptq`; a category, a framework, or a paper's key.")],
    as_json: Json = False,
) -> None:
    """One method, category, framework or paper, whole."""
    from refimpl import views

    loaded = taxonomy.load()
    name = id.strip("/")
    slug = name.replace("_", "-").lower()
    if slug in loaded.methods:
        method = loaded.methods[slug]
        _json(loaded.as_dict(method)) if as_json else out.print(views.method_view(loaded, method))
    elif name in loaded.categories:
        category = loaded.categories[name]
        _json(msgspec.to_builtins(category)) if as_json else out.print(views.category_view(loaded, category))
    elif slug in loaded.frameworks:
        framework = loaded.frameworks[slug]
        _json(msgspec.to_builtins(framework)) if as_json else out.print(views.framework_view(framework))
    elif slug in loaded.papers:
        paper = loaded.papers[slug]
        _json(msgspec.to_builtins(paper)) if as_json else sys.stdout.write(loaded.bibtex([paper]))
    else:
        guess = near(slug, [*loaded.methods, *loaded.categories, *loaded.frameworks, *loaded.papers])
        raise Refused(
            f"unknown method, category, framework or paper {name!r}{guess} (`effllm tree`, `effllm papers` list them)"
        )


@app.command()
def search(
    text: Annotated[list[str] | None, typer.Argument(help="Words that must all occur.")] = None,
    category: Category = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    year: Annotated[int | None, typer.Option(help="Only from this year.")] = None,
    venue: Annotated[str | None, typer.Option(help="Only from this venue.")] = None,
    relation: Annotated[
        str | None, typer.Option(help="Only with such an edge: `builds_on` or `builds_on:gptq`.")
    ] = None,
    facet: Annotated[
        list[str] | None, typer.Option("--facet", "-f", help="`training=none`, `calibration=no`, …")
    ] = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Only what runs.")] = False,
    as_json: Json = False,
) -> None:
    """Methods by words, tags and facets: which one fits?"""
    from refimpl.views import methods_view

    loaded = taxonomy.load()
    found = loaded.find(
        " ".join(text or []),
        category=_known_category(loaded, category),
        tag=tag,
        year=year,
        venue=venue,
        relation=relation,
        implemented=True if implemented else None,
        facets=dict(_facet(item) for item in facet or []),
    )
    if as_json:
        _json([loaded.as_dict(m) for m in found])
    elif found:
        out.print(methods_view(found))
    else:
        _nothing_found(loaded, text or [], tag)


def _facet(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in Facets.__struct_fields__:
        raise Refused(f"--facet {text!r} must be name=value; names: {', '.join(Facets.__struct_fields__)}")
    words: dict[str, object] = {"yes": True, "true": True, "no": False, "false": False, "null": None}
    return name, words.get(value.lower(), value)


def _nothing_found(loaded: Taxonomy, text: list[str], tag: str | None) -> None:
    tags = {t for m in loaded.methods.values() for t in m.tags}
    guess = near(tag, tags) if tag and tag not in tags else ""
    guess = guess or near(" ".join(text), [*loaded.methods, *(m.name for m in loaded.methods.values())])
    err.print(f"nothing found{guess}", markup=False)
    raise typer.Exit(1)


@app.command()
def papers(
    text: Annotated[
        list[str] | None, typer.Argument(help="Words that must all occur in key, title, name or authors.")
    ] = None,
    category: Category = None,
    year: Annotated[int | None, typer.Option(help="Only from this year.")] = None,
    venue: Annotated[str | None, typer.Option(help="Only from this venue.")] = None,
    method: Annotated[str | None, typer.Option(help="Only those of this method.")] = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """The bibliography, filtered; as a table, BibTeX, CSV or JSON."""
    from refimpl.views import papers_view

    loaded = taxonomy.load()
    category = _known_category(loaded, category)
    keys = _method(loaded, method).papers if method else None
    found = [
        p
        for p in loaded.papers.values()
        if (keys is None or p.key in keys)
        and (year is None or p.year == year)
        and (venue is None or p.venue.casefold() == venue.casefold())
        and (category is None or any(f"{c}/".startswith(f"{category}/") for c in p.categories))
        and all(w.casefold() in f"{p.key} {p.title} {p.name} {p.authors}".casefold() for w in text or [])
    ]
    found.sort(key=lambda p: (-p.year, p.key))
    if bibtex + as_csv + as_json > 1:
        raise Refused("--bibtex, --csv and --json exclude each other; give one")
    if bibtex:
        sys.stdout.write(loaded.bibtex(found))
    elif as_csv:
        write = csv.writer(sys.stdout, lineterminator="\n")
        write.writerow(["key", "title", "year", "venue", "arxiv", "url", "code", "categories"])
        write.writerows(
            [p.key, p.title, p.year, p.venue, p.arxiv, p.url, p.code, " ".join(p.categories)] for p in found
        )
    elif as_json:
        _json(msgspec.to_builtins(found))
    elif found:
        out.print(papers_view(found))
        out.print(f"[dim]{len(found)} of {len(loaded.papers)} papers[/]")
    else:
        err.print("nothing found", markup=False)
        raise typer.Exit(1)


@app.command()
def graph(
    around: Annotated[str | None, typer.Option(help="Only this method and its neighbours.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Steps away from it.")] = 1,
    category: Category = None,
    relation: Annotated[list[str] | None, typer.Option(help="Only edges of this kind; may be repeated.")] = None,
    papers: Annotated[bool, typer.Option("--papers", help="With papers.")] = False,
    layout: Annotated[str, typer.Option(help="`layered` by year, `radial` by tree, or `auto`.")] = "auto",
    format: Annotated[
        str | None, typer.Option("--format", help="`svg`, `dot`, `mermaid`, `graphml` or `json`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; its suffix gives the format.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The graph of methods, drawn or exported."""
    from taxonomy import graph as graphs

    loaded = taxonomy.load()
    chosen = graphs.select(
        loaded,
        around=_method(loaded, around).id if around else None,
        depth=depth,
        category=_known_category(loaded, category),
        relation=relation or [],
        papers=papers,
    )
    suffix = output.suffix if output else ".mmd"
    kind = "json" if as_json else format or graphs.SUFFIXES.get(suffix)
    if kind is None:
        raise Refused(f"--output {str(output)!r}: its suffix names no format; known: {', '.join(graphs.SUFFIXES)}")
    text = graphs.render(chosen, cast(graphs.Format, kind), layout=cast(graphs.LayoutName, layout))
    if output is None:
        sys.stdout.write(text + ("" if text.endswith("\n") else "\n"))
    else:
        output.write_text(text, encoding="utf-8")
        err.print(f"{output}: {chosen.number_of_nodes()} nodes, {chosen.number_of_edges()} edges")


@app.command()
def check(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of YAML files; the installed taxonomy if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate every file of the taxonomy; all problems in one run, each with its place."""
    problems = taxonomy.validate(path)
    root = Path(path) if path else taxonomy.ROOT
    if as_json:
        _json([problem._asdict() for problem in problems])
    else:
        for problem in problems:
            sys.stdout.write(f"{root / problem.file}:{problem.line}:{problem.column}: {problem.message}\n")
    if problems:
        if not as_json:
            err.print(f"[red]{len(problems)} problems[/]")
        raise typer.Exit(1)
    loaded = taxonomy.load(path)
    ready = sum(m.implemented for m in loaded.methods.values())
    if not as_json:
        out.print(
            f"[green]valid:[/] {len(loaded.papers)} papers, {len(loaded.categories)} categories, {len(loaded.methods)} "
            f"methods ({ready} run), {len(loaded.frameworks)} frameworks"
        )


@app.command()
def claims(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all if left out.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the tests that measure them (in a checkout).")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where measured claims are stored.")] = None,
    as_json: Json = False,
) -> None:
    """Claims of the papers, beside what was measured here."""
    from refimpl import results
    from refimpl.views import claims_view

    loaded = taxonomy.load()
    chosen = [_method(loaded, name) for name in methods or []] or [m for m in loaded.methods.values() if m.claims]
    code, measured = 0, results.claims()
    if measure:
        fresh, code = _measure_claims(chosen, output or results.fresh_folder() / "claims.json")
        measured |= {(row.method, row.claim): msgspec.to_builtins(row) for row in fresh}
    if as_json:
        rows = [(m, c, measured.get((m.id, c.id), {})) for m in chosen for c in m.claims]
        _json(
            [
                {"method": m.id, **msgspec.to_builtins(c), "value": row.get("value"), "held": row.get("holds")}
                for m, c, row in rows
            ]
        )
    else:
        out.print(claims_view(measured, chosen))
        if silent := [m.id for m in chosen if not m.claims]:
            err.print(f"no claims stated yet: {', '.join(silent)}", markup=False)
    raise typer.Exit(code)


def _measure_claims(chosen: list[Method], path: Path) -> tuple[list[Any], int]:
    from rich.progress import track

    from refimpl import claims as ledger
    from refimpl import results

    if not (CHECKOUT / "tests").is_dir():
        raise Refused("claims are measured by the tests, which stand in a checkout of the repository, not in the wheel")
    rows, worst = [], 0
    for method in track(chosen, "claims", console=err, transient=True):
        measured, code, said = ledger.measure([method.id], CHECKOUT / "tests")
        rows += measured
        if code:
            worst = 1
            err.print(said, markup=False)
    results.store_claims(path, rows)
    return rows, worst


@app.command()
def run(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all that run if left out.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder in which figures are stored.")] = None,
    as_json: Json = False,
) -> None:
    """A method in its arena, beside the baseline."""
    loaded = taxonomy.load()
    chosen = [_method(loaded, name) for name in methods or []]
    chosen = chosen or [m for m in loaded.find(implemented=True) if m.arena]
    for method in chosen:
        if not method.implemented:
            raise Refused(f"{method.id!r} has no implementation yet (`effllm tree --implemented` lists those that run)")
        if not method.arena:
            raise Refused(f"{method.id!r} has joined no arena; add `arena:` to taxonomy/{method.path}.yaml")
    with _needs_extra("run"):
        import torch

        from refimpl import results
        from refimpl.arena import runner
    _check_device(torch, device)
    from refimpl.views import figures_view

    todo = runner.cells(chosen, range(seeds))
    with _progress(len(todo)) as advance:
        rows = runner.run(todo, device, advance)
    written = runner.store(rows, output or results.fresh_folder(), device)
    names = {m.id for m in chosen}
    for path in written:
        document = json.loads(path.read_text())
        if as_json:
            _json({**document, "rows": [r for r in document["rows"] if r["method"] in names | {document["baseline"]}]})
        else:
            out.print(f"\n[bold]{document['arena']}[/]  {document['about']}")
            out.print(figures_view(document, names))
    failed = [row for row in rows if row.error]
    for row in failed:
        err.print(f"{row.arena}, {row.method} {row.settings}: {row.error}", markup=False, style="red")
    if not as_json:
        err.print(f"[dim]stored in {', '.join(map(str, written))}[/]")
    raise typer.Exit(1 if failed else 0)


@contextmanager
def _needs_extra(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Refused(f"this needs {error.name}; install it with `pip install effllm[{extra}]`") from error


def _check_device(torch: Any, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("running", total=total)
        yield lambda row: bar.update(task, advance=1, description=row.method)


@app.command()
def new(
    place: Annotated[str, typer.Argument(metavar="CATEGORY/ID", help="As `compression/low_rank/svd`.")],
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path(),
    as_json: Json = False,
) -> None:
    """The three files of a new method, failing until they are filled."""
    try:
        from tools.new import scaffold
    except ModuleNotFoundError as error:
        raise Refused("`effllm new` works in a checkout of the repository, not from the wheel") from error
    if not (root / "taxonomy" / "papers").is_dir():
        raise Refused(f"{str(root.resolve())!r} is no checkout of effllm; change into one, or give it as --root")
    before = set((root / "taxonomy").rglob("*.yaml"))
    written = scaffold(place, root)
    if as_json:
        _json([str(path) for path in written])
        return
    for path in written:
        out.print(f"{'added to' if path in before else 'wrote'} {path}")
    out.print("Fill them from top to bottom; `effllm check` and the test say what is missing.")


if __name__ == "__main__":
    main()
