"""Ours beside another project's implementation, on the same inputs, in one process: `python -m tools.peers`.

A method's test states the pair through the fixture `peer`, which holds the two results together whenever the test runs. Here the
same tests run alone, one after the other, and also report time and memory:

    difference    largest absolute difference of the results
    time          median time of ours over theirs, the calls taking turns
    memory        peak bytes that ours allocates over theirs, inputs not counted
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import taxonomy
from refimpl.claims import run_tests, test_file
from refimpl.cli import run_app
from refimpl.environment import environment
from refimpl.results import CHECKOUT, fresh_folder, kept_rows

ROUNDS, SECONDS = 9, 2.0  # of timing: at least so many, and at most about so long

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A method, or `refimpl.model`, beside its peer, on what `what` says; time and memory are ratios, ours over theirs.

    The last word of `peer` is the package whose version is `version`: `peft`, or `the procedure, written out in torch`.
    """

    method: str
    peer: str
    version: str
    what: str
    difference: float
    seconds: float = 0.0
    time: float = 0.0
    memory: float = 0.0


def compare(method: str, peer: str, what: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Pair:
    """The largest difference of two results, which are tensors or sequences of them.

    Raises:
        ValueError: results of different shapes, or none.
    """
    mine, other = list(_tensors(ours())), list(_tensors(theirs()))
    if not mine or len(mine) != len(other):
        raise ValueError(f"{method} returns {len(mine)} tensors and {peer} {len(other)}: nothing to compare")
    pairs = list(zip(mine, other, strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"{method} returns {tuple(a.shape)} where {peer} returns {tuple(b.shape)}")
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return Pair(method=method, peer=peer, version=version(peer.rpartition(" ")[2]), what=what, difference=difference)


def timed(pair: Pair, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Pair:
    """The pair with time and memory of the two calls, which take turns, so that both meet the same machine."""
    spent: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + SECONDS
    while len(spent[0]) < ROUNDS or (time.perf_counter() < until and len(spent[0]) < 10 * ROUNDS):
        for call, times in zip((ours, theirs), spent, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    mine, other = (statistics.median(times) for times in spent)
    memory = peak_bytes(ours) / max(1, peak_bytes(theirs))
    return msgspec.structs.replace(pair, seconds=mine, time=mine / other, memory=memory)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that torch held for a call at one time, beyond what it held before.

    Examples:
        Two products of 4,000 bytes each and their sum:

        >>> x = torch.ones(10, 100)
        >>> peak_bytes(lambda: x * 2 + x * 3)
        12000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    # The public table sums what each operator allocated; only the raw events tell what was held at one time.
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _tensors(result: Any) -> Iterable[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    else:
        for part in result:
            yield from _tensors(part)


def store(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs with the environment; those of methods that did not run are kept."""
    fresh, stamp = [msgspec.to_builtins(pair) for pair in pairs], environment()
    kept = kept_rows(path, "peers", {row["method"] for row in fresh}, stamp)
    rows = sorted(kept + fresh, key=lambda row: (row["method"], row["peer"], row["what"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": stamp, "peers": rows}, indent=1) + "\n", encoding="utf-8")


@app.command()
def main(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all that have a peer if left out.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the figures are stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure methods beside their peers."""
    loaded = taxonomy.load()
    for name in methods or []:
        if name not in loaded.methods:
            raise ValueError(f"unknown method {name!r}{taxonomy.near(name, loaded.methods)} (`effllm tree` lists all)")
    chosen = [loaded.methods[name] for name in methods or []] or loaded.find(implemented=True)
    files = [path for m in chosen if (path := test_file(m, CHECKOUT / "tests")).exists()]
    files += [] if methods else [CHECKOUT / "tests/model/test_generate.py"]
    rows, failed, said = run_tests("peers", files, CHECKOUT, ["-n", "0"])  # one after the other: they are timed
    pairs = [msgspec.convert(row, Pair) for row in rows]
    path = output or fresh_folder() / "peers.json"
    if pairs:
        store(path, pairs)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(pairs)))
    else:
        Console().print(_table(pairs))
    if failed:
        typer.echo(said, err=True)
    if not pairs:
        typer.echo("no method of these has a test that takes the fixture `peer`", err=True)
    raise typer.Exit(1 if failed or not pairs else 0)


def _table(pairs: Iterable[Pair]) -> Table:
    table = Table("method", "peer", "on", "difference", "time", "memory", box=None)
    for pair in pairs:
        figures = (f"{pair.difference:.2g}", f"{pair.time:.2f}×", f"{pair.memory:.2f}×")
        table.add_row(pair.method, f"{pair.peer} {pair.version}", pair.what, *figures)
    return table


if __name__ == "__main__":
    run_app(app)
