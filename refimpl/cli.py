"""The command `effllm`. What needs no torch does not import it."""

import csv
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

import taxonomy
from refimpl.results import CHECKOUT
from taxonomy import Facets, InvalidTaxonomy, Method, Taxonomy
from taxonomy.schema import near

if TYPE_CHECKING:
    from refimpl.bench.cells import Cell
    from refimpl.bench.runner import Row

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
    if as_json and format not in (None, "json"):
        raise Refused(f"--json and --format {format} exclude each other; give one of them")
    suffix = output.suffix if output else ".mmd"
    kind = "json" if as_json else format or graphs.SUFFIXES.get(suffix)
    if kind is None:
        raise Refused(f"--output {str(output)!r}: its suffix names no format; known: {', '.join(graphs.SUFFIXES)}")
    if output and kind in graphs.SUFFIXES.values() and graphs.SUFFIXES.get(suffix, kind) != kind:
        raise Refused(f"--output {str(output)!r}: its suffix names another format than {kind}; leave one of them out")
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

    if output and not measure:
        raise Refused(f"--output {str(output)!r} is where measured claims are stored; give --measure, too")
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
    from rich.progress import Progress

    from refimpl import claims as ledger
    from refimpl import results

    if not (CHECKOUT / "tests").is_dir():
        raise Refused("claims are measured by the tests, which stand in a checkout of the repository, not in the wheel")
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("claims", total=100)
        rows, code, said = ledger.measure(
            [m.id for m in chosen], CHECKOUT / "tests", lambda done: bar.update(task, completed=done)
        )
    if code:
        err.print(said, markup=False)
    results.store_claims(path, rows)
    return rows, min(code, 1)


Device = Annotated[str, typer.Option(help="torch device.")]
Model = Annotated[
    Path | None, typer.Option(help="Local folder of a Hugging Face checkpoint, in the place of the testbed's model.")
]
Texts = Annotated[
    Path | None,
    typer.Option(
        help="Local folder of LongBench's files and of prose, in the place of the long-context arena's own texts."
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder in which the documents are stored.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run again what failed before.")]
StoreFile = Annotated[
    Path | None, typer.Option("--store", help="File of finished cells; `build/results/bench.sqlite` if left out.")
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Cells at a time.")]


@app.command()
def run(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all that run if left out.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    model: Model = None,
    device: Device = "cpu",
    jobs: Jobs = None,
    output: Output = None,
    retry: Retry = False,
    store: StoreFile = None,
    as_json: Json = False,
) -> None:
    """A method in its arenas, in their quick form, beside the baseline."""
    loaded = taxonomy.load()
    chosen = [_method(loaded, name) for name in methods or []]
    for method in chosen:
        _check_runs(method)
        if not method.arena:
            raise Refused(f"{method.id!r} has joined no arena; add `arena:` to taxonomy/{method.path}.yaml")
    if not chosen:
        chosen = [m for m in loaded.find(implemented=True) if m.arena]
    with _needs_extra("run"):
        from refimpl.bench.cells import cells

        model = _check_place(device, model)
        todo = cells(chosen, seeds=range(seeds), quick=True, device=device, model=str(model) if model else None)
    # Starting processes takes longer than a few quick cells.
    engine = "here" if methods and jobs is None else "loky"
    _measure(todo, jobs=jobs, engine=engine, retry=retry, store=store, output=output, as_json=as_json)


@app.command()
def bench(
    arena: Annotated[str | None, typer.Argument(help="An arena, or `all`; left out: which there are.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these, as `rtn,gptq`.")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Your own class beside them: `package.module:Class`; may be repeated.")
    ] = None,
    model: Model = None,
    texts: Texts = None,
    device: Device = "cpu",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds; 3 if left out, 1 in the quick form.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Default settings only, and less of everything.")] = False,
    jobs: Jobs = None,
    engine: Annotated[
        str,
        typer.Option(
            help="`loky`: processes of this machine; `ray`: a cluster, by `RAY_ADDRESS`; `here`: this process, for debuggers."
        ),
    ] = "loky",
    retry: Retry = False,
    store: StoreFile = None,
    output: Output = None,
    export: Annotated[
        list[Path] | None, typer.Option(help="Write to FILE.json, FILE.csv or FILE.html too; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """An arena: all its methods, settings and tasks side by side. What was finished before is not run again."""
    loaded = taxonomy.load()
    with _needs_extra("run"):
        from refimpl.bench import cells as the
        from refimpl.bench.export import check_export
        from refimpl.bench.plugin import open_plugin

        able = [m for m in loaded.find(implemented=True) if m.arena]
        if arena is None:
            _list_arenas(able, as_json)
            return
        names = the.arenas() if arena == "all" else [arena.replace("-", "_")]
        for name in names:
            the.open_arena(name)
    chosen = _chosen(loaded, methods.split(","), names) if methods else able
    with _needs_extra("docs"):
        for path in export or []:
            check_export(path)
    model = _check_place(
        "cpu" if engine == "ray" else device, model
    )  # a cluster's nodes may have what this one has not
    todo = the.cells(
        chosen,
        arenas=names,
        plugins=[open_plugin(reference) for reference in plugin or []],
        seeds=range(seeds or (1 if quick else 3)),
        quick=quick,
        device=device,
        model=str(model) if model else None,
        texts=str(_check_texts(texts)) if texts else None,
    )
    _measure(
        todo, jobs=jobs, engine=engine, retry=retry, store=store, output=output, export=export or (), as_json=as_json
    )


def _chosen(loaded: Taxonomy, names: list[str], arenas: list[str]) -> list[Method]:
    chosen = [_method(loaded, name.strip()) for name in names]
    for method in chosen:
        _check_runs(method)
        if not set(method.arena) & set(arenas):
            joined = ", ".join(method.arena) or "none"
            raise Refused(f"{method.id!r} is not in the arena {', '.join(arenas)}; its arenas: {joined}")
    return chosen


def _check_runs(method: Method) -> None:
    if not method.implemented:
        raise Refused(f"{method.id!r} has no implementation yet (`effllm tree --implemented` lists those that run)")


def _list_arenas(able: list[Method], as_json: bool) -> None:
    from refimpl.bench.cells import arenas, cells, open_arena
    from refimpl.views import arenas_view

    found = [
        {
            "arena": name,
            "about": open_arena(name).ABOUT,
            "axes": {axis: list(values) for axis, values in open_arena(name).AXES.items()},
            "methods": [m.id for m in able if name in m.arena],
            "cells": len(cells(able, arenas=[name])),
            "quick_cells": len(cells(able, arenas=[name], quick=True)),
        }
        for name in arenas()
    ]
    _json(found) if as_json else out.print(arenas_view(found))


def _measure(
    todo: "list[Cell]",
    *,
    jobs: int | None,
    engine: str = "loky",
    retry: bool = False,
    store: Path | None = None,
    output: Path | None = None,
    export: Sequence[Path] = (),
    as_json: bool = False,
) -> None:
    """Run cells, show their figures and store them: what `run` and `bench` have in common."""
    from refimpl import results
    from refimpl.bench import documents, runner
    from refimpl.bench.engines import ENGINES, Pool
    from refimpl.bench.export import export as write
    from refimpl.bench.progress import Bar
    from refimpl.bench.store import Store

    if engine not in ENGINES:
        raise Refused(f"--engine {engine!r} must be one of {', '.join(ENGINES)}")
    if not todo:
        return
    folder = output or results.fresh_folder()
    with _needs_extra("ray"):
        pool = Pool(cast(Any, engine), jobs, todo[0].device)
    try:
        with Store(store or results.fresh_folder() / "bench.sqlite") as opened, Bar(err) as bar:
            rows = runner.run(todo, opened, pool, retry=retry, told=bar)
    except KeyboardInterrupt:
        err.print(f"interrupted: {bar.finished} of {bar.total} cells are stored; the same command goes on from there")
        raise typer.Exit(130) from None
    found = [
        documents.document(name, rows, todo[0].model, todo[0].texts)
        for name in dict.fromkeys(cell.arena for cell in todo)
    ]
    for document in found:
        _show(document, as_json)
    _show_failures(rows)
    for document in found:
        path = documents.store(document, folder)
        kept = folder / f"{documents.stem(document)}.json"
        err.print(f"[dim]stored in {path}[/]" if path else f"[dim]{kept} holds the full form's figures, and stays[/]")
    for path in export:
        write(found, path)
    raise typer.Exit(1 if any(row.error for row in rows) else 0)


def _show(document: dict[str, Any], as_json: bool) -> None:
    from refimpl.bench.export import with_summary
    from refimpl.views import PLACES, figures_view

    if as_json:
        _json(with_summary(document))
        return
    form = ", quick form" if document.get("quick") else ""
    places = "".join(f" {word} {document[name]}" for word, name in PLACES if name in document)
    out.print(f"\n[bold]{document['arena']}[/]{escape(places)}{form}  {escape(document['about'])}")
    out.print(figures_view(document, {row["method"] for row in document["rows"]}, out.width))


def _show_failures(rows: "list[Row]") -> None:
    """Each error once, with the cells that raised it."""
    errors: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.error:
            errors.setdefault((row.arena, row.error), []).append(row)
    for (arena, error), failed in errors.items():
        first = {**failed[0].settings, **failed[0].axes}
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        also = ", ".join(dict.fromkeys(row.method for row in failed if row.method != failed[0].method))
        others += f", also of {also}" if also else ""
        err.print(f"{arena}, {failed[0].method} {first}{others}: {error}", markup=False, style="red")
    for arena in {row.arena: None for row in rows if row.error and ":" in row.method}:
        err.print(f"how the arena {arena} calls a method: {', '.join(_protocols(arena))}", markup=False)


def _protocols(arena: str) -> list[str]:
    """The protocols of the families whose methods stand in an arena: of each, the nearest file above it."""
    code = CHECKOUT / "refimpl"
    found: dict[str, None] = {}
    for method in taxonomy.load().find(implemented=True):
        if arena in method.arena:
            above = [folder / "protocol.py" for folder in (code / method.path).parents if folder.is_relative_to(code)]
            found |= {path.relative_to(CHECKOUT).as_posix(): None for path in above if path.is_file()}
    return list(found)


def _check_place(device: str, model: Path | None) -> Path | None:
    """The model's whole path, once device and model are found to be there."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if model is not None and not (model / "config.json").is_file():
        what = "has no config.json" if model.is_dir() else "is no folder"
        raise Refused(f"--model {str(model)!r} {what}; give the local folder of a Hugging Face checkpoint")
    return model.resolve() if model else None


def _check_texts(texts: Path) -> Path:
    """The texts' whole path, once it is found to be a folder."""
    if not texts.is_dir():
        raise Refused(
            f"--texts {str(texts)!r} is no folder; give one with LongBench's files (qasper.jsonl, …) or prose (*.txt)"
        )
    from refimpl.long_context.longbench import in_chinese

    if left := in_chinese(texts):
        err.print(f"not asked, since text in Chinese is not scored here: {', '.join(path.name for path in left)}")
    return texts.resolve()


@contextmanager
def _needs_extra(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Refused(f"this needs {error.name}; install it with `pip install '.[{extra}]'` in a checkout") from error


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
