"""The graph of methods, drawn and checked.

    python -m tools.graph render --around gptq --depth 2 --output gptq.svg
    python -m tools.graph check --min 60

`render` is `effllm graph`; `check` counts coverage, and fails for a broken thing.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import taxonomy
from refimpl.cli import graph, run_app
from tools.coverage import check

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The graph of methods: drawn, exported, checked.")
app.command("render")(graph)


@app.command("check")
def check_command(
    minimum: Annotated[float, typer.Option("--min", help="Fail if fewer percent of the methods run.")] = 0.0,
    everything: Annotated[bool, typer.Option("--all", help="Every category, and every line of the drift.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    path: Annotated[Path | None, typer.Option("--path", help="Folder of YAML files, if not the installed one.")] = None,
) -> None:
    """Coverage by category, drift from the survey's list, and every broken thing; fails if there is one."""
    report = check(taxonomy.load(path))
    failures = report.failures(minimum)
    if as_json:
        typer.echo(json.dumps({**report.to_dict(), "failures": failures}, ensure_ascii=False))
    else:
        Console().print(report.table(depth=99 if everything else 2))
        for line in [*report.lines(None if everything else 10), *failures]:
            typer.echo(line)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
