"""The commands `python -m tools.graph`; what they draw is tested beside `taxonomy.graph`."""

import sys

import pytest

import taxonomy
from refimpl.cli import run_app
from tools.graph import app


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Runs the commands as the shell does: (exit code, output, errors)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tools.graph", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_app(app)
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def command(monkeypatch, grow, invoke):
    """The same on a made-up taxonomy."""
    tree = grow(12, papers=4)
    monkeypatch.setattr(taxonomy, "load", lambda path=None: tree)
    return invoke


def test_the_suffix_names_the_format(command, tmp_path):
    starts = {".svg": "<svg", ".dot": "digraph", ".mmd": "graph LR", ".graphml": "<graphml", ".json": "{"}
    for suffix, start in starts.items():
        path = tmp_path / f"out{suffix}"
        assert command("render", "--output", path)[0] == 0
        assert path.read_text(encoding="utf-8").startswith(start)
    assert command("render", "--format", "mermaid", "--around", "m3")[1].startswith("graph LR")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--around", "m33"], "error: unknown method 'm33'; did you mean 'm3'?"),
        (
            ["--format", "swg"],
            "error: unknown format 'swg'; did you mean 'svg'?; known: svg, dot, mermaid, graphml, json",
        ),
        (["--output", "tree.png"], "error: --output 'tree.png': its suffix names no format; known: .svg, .dot"),
        (["--output", "/nowhere/at/all.svg"], "error: [Errno 2] No such file or directory: '/nowhere/at/all.svg'"),
    ],
)
def test_a_refusal_is_one_line(command, words, message):
    code, _, said = command("render", *words)
    assert code == 1
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_broken_taxonomy_lists_its_problems(invoke, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "_category.yaml").write_text("nmae: X\n")
    code, _, said = invoke("check", "--path", tmp_path)
    assert code == 1
    *lines, last = said.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("x/_category.yaml:") for line in lines)
    assert "problems in the taxonomy" in last
    code, _, said = invoke("check", "--path", tmp_path / "gone")
    assert (code, said.count("\n")) == (1, 1)
