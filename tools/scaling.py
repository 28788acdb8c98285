"""How validation, loading and the graph grow with the number of methods: `python -m tools.scaling`.

Writes synthetic trees into a temporary folder, times each step on them, fits the exponent of time against size, and prints
a table; with `--output` it also writes the figures as JSON.
"""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import taxonomy
from taxonomy.reader import read

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
IN_CATEGORY = 50

METHOD = """\
name: Method {i}
summary: A synthetic method that stands for a real one.
papers: [paper-{i}]
tags: [synthetic, number-{tag}]
relations:
  builds_on: [{before}]
idea: |
  It takes the weights $W$ and multiplies them by a number that depends on the place of the method in the tree, $W' = {i} W$.
when: Where a tree of many methods is wanted, and nowhere else.
facets: {{stage: [post-training], training: none, calibration: false, exact: false, frees_memory: true, changes_architecture: false}}
"""
CATEGORY = "name: Category {i}\nsummary: Holds methods.\norder: 1\ntext: |\n  {text}\n"
PAPER = "paper-{i}:\n  title: Paper {i}\n  venue: arXiv\n  url: https://example.org/{i}\n  categories: [{category}]\n"


def synthesize(root: Path, methods: int) -> None:
    """Write a valid tree with that many methods and papers below `root`."""
    (root / "papers").mkdir(parents=True)
    papers = []
    for i in range(methods):
        category = f"family_{i // IN_CATEGORY}"
        folder = root / category
        if i % IN_CATEGORY == 0:
            folder.mkdir()
            text = "A synthetic category. " * 20
            (folder / "_category.yaml").write_text(CATEGORY.format(i=i, text=text))
        before = f"method-{i - 1}" if i else ""
        (folder / f"method_{i}.yaml").write_text(METHOD.format(i=i, tag=i % 100, before=before))
        papers.append(PAPER.format(i=i, category=category))
    (root / "papers" / "2020.yaml").write_text("".join(papers))


def time_steps(methods: int) -> dict[str, float]:
    """Seconds for each step on a tree of that many methods."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "taxonomy"
        synthesize(root, methods)
        seconds, reading = _timed(lambda: read(root))
        assert not reading.problems(), reading.problems()[:3]
        first, _ = _timed(lambda: taxonomy.load(root))
        again, tree = _timed(lambda: taxonomy.load(root))
        graph, _ = _timed(tree.graph)
        search, _ = _timed(lambda: tree.find("weights", tag="number-7"))
        taxonomy.stored_at(root).unlink(missing_ok=True)
    return {"validate": seconds, "load, first": first, "load, compiled": again, "graph": graph, "find": search}


def _timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and value of a step, without the garbage collector, whose turns come with the size, as `timeit` does."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        value = step()
        return time.perf_counter() - start, value
    finally:
        gc.enable()


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log time against log size by least squares: 1 is linear.

    Examples:
        >>> round(exponent([10, 100, 1000], [0.2, 2.0, 20.0]), 3)
        1.0
    """
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main(
    largest: Annotated[int, typer.Option(help="Leave out larger sizes.")] = SIZES[-1],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Time validation, loading, graph and search on trees of 1,000 to 100,000 synthetic methods."""
    sizes = [n for n in SIZES if n <= largest]
    if len(sizes) < 2:
        raise typer.BadParameter(f"--largest must be at least {SIZES[1]}: an exponent needs two sizes")
    console = Console()
    rows = {n: time_steps(n) for n in track(sizes, "sizes", console=Console(stderr=True), transient=True)}
    table = Table(title="seconds")
    table.add_column("methods", justify="right")
    steps = list(rows[sizes[0]])
    for step in steps:
        table.add_column(step, justify="right")
    for n in sizes:
        table.add_row(f"{n:,}", *(f"{rows[n][step]:.3g}" for step in steps))
    fitted = {step: exponent(sizes, [rows[n][step] for n in sizes]) for step in steps}
    table.add_row("exponent", *(f"{fitted[step]:.2f}" for step in steps), style="bold")
    console.print(table)
    if output:
        from refimpl.environment import environment

        document = {"environment": environment(), "seconds": rows, "exponent": fitted}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
