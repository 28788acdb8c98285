"""The command line: what it prints, how it fails. Oracles: the query API and the files, and other people's parsers of what is printed."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import taxonomy
from refimpl import cli, results, views
from refimpl.bench.runner import Row
from tests.small_tree import AWQ, FILES, GPTQ, LAYERS, LORA, RTN

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run("show", "gptq")`: exit code, output and error output of the command, called in this process, 80 columns wide."""
    monkeypatch.setattr(cli.out, "width", 80)
    monkeypatch.setenv("COLUMNS", "80")  # for the pages of help
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer sets it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["effllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return left.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def small(small_tree, monkeypatch):
    """The small tree in the place of the installed one."""
    monkeypatch.setattr(taxonomy, "ROOT", small_tree)
    return small_tree


@pytest.fixture
def effllm(run, small):
    return run


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Folders of results, empty ones, in the place of this checkout's."""
    for name in ("committed_folder", "fresh_folder"):
        monkeypatch.setattr(results, name, lambda name=name: tmp_path / name)
    return tmp_path


def change(tree, name, old, new):
    text = (tree / name).read_text(encoding="utf-8")
    assert old in text
    (tree / name).write_text(text.replace(old, new), encoding="utf-8")


def words(text):
    """What is said, however it is broken into lines."""
    return " ".join(text.split())


# tree


def test_tree_shows_every_category_and_method(effllm):
    code, out, _ = effllm("tree")
    assert code == 0
    assert re.findall(r"[●○] ([a-z-]+)  \d{4}$", out, re.MULTILINE) == ["rtn", "gptq", "awq", "lora", "dora-x", "qlora"]
    assert "● rtn  2017" in out
    assert "1 of 3 run" in out
    assert out.index("compression") < out.index("finetuning") < out.index("systems")


def test_tree_of_a_part(effllm):
    assert effllm("tree", "finetuning")[1].splitlines() == [
        "Fine-tuning",
        "├── ○ lora  2021",
        "├── ○ dora-x  2023",
        "├── ○ qlora  2023",
        "└── ● runs   ○ described, no code yet",
    ]
    assert effllm("tree", "finetuning/") == effllm("tree", "finetuning")
    assert effllm("tree", "--depth", 1)[1].splitlines() == [
        "Efficient large language models",
        "├── compression  Compression  1 of 3 run",
        "├── finetuning  Fine-tuning  0 of 3 run",
        "└── systems  Systems  reading list",
    ]
    out = effllm("tree", "--implemented")[1]
    assert "rtn" in out
    assert not re.search("gptq|finetuning|systems", out)


def test_tree_as_json(effllm, small):
    document = json.loads(effllm("tree", "--json")[1])
    assert [c["id"] for c in document["categories"]] == list(taxonomy.load(small).categories)
    assert [m["id"] for m in document["methods"]] == ["rtn", "gptq", "awq", "lora", "dora-x", "qlora"]
    document = json.loads(effllm("tree", "finetuning", "--json", "--implemented")[1])
    assert ([c["id"] for c in document["categories"]], document["methods"]) == (["finetuning"], [])


# show


def test_show_a_method(effllm):
    code, out, _ = effllm("show", "gptq")
    assert code == 0
    assert out.startswith(f"GPTQ  gptq  2022  {LAYERS}\nWhat GPTQ does.\ndescribed, no code yet\n")
    for part in (
        "calibration yes",
        "exact no",
        "stage post-training, prefill",
        "training none",
        "builds on rtn",
        "composes with lora",
    ):
        assert part in words(out)
    assert "alternative to awq" in words(out)  # its file says so
    assert "built on by dora-x, qlora part of qlora alternative to dora-x composes with gptq" in words(
        effllm("show", "lora")[1]
    )
    assert "GPTQ: Accurate ICLR 2023 https://example.org/gptq" in words(out)
    assert "gqa" not in out  # a facet without meaning for the method
    out = effllm("show", "rtn")[1]
    assert f"runs: refimpl.{LAYERS.replace('/', '.')}.rtn.RTN" in out
    assert "error-bound: No weight moves by more than half a step. Expected: < 0.50001 steps (Table 1)." in words(out)
    assert "Expected: < 1 ratio (Table 2). Does not hold here: " in words(out)
    assert "measured: `effllm claims rtn`" in words(out)


@pytest.mark.parametrize("name", ["dora-x", "dora_x", "DORA-X", "Dora_X"])
def test_show_takes_an_id_as_it_is_written_in_files(effllm, name):
    assert effllm("show", name)[1].startswith("DoRA  dora-x")


def test_show_a_category(effllm):
    code, out, _ = effllm("show", LAYERS)
    assert code == 0
    assert out.startswith("Weights only\nWeights only in one sentence.\n\nWhat it is about")
    assert re.findall(r"^[●○]  ([a-z]+) +\d{4}  What", out, re.MULTILINE) == ["rtn", "gptq", "awq"]
    assert out.endswith(f"3 papers: effllm papers -c {LAYERS}\n")


def test_show_a_paper(effllm, small):
    assert effllm("show", "rtn-2018")[1] == taxonomy.load(small).bibtex(["rtn-2018"])


def test_show_as_json(effllm, small):
    tree = taxonomy.load(small)
    assert json.loads(effllm("show", "gptq", "--json")[1]) == tree.as_dict(tree.methods["gptq"])
    assert json.loads(effllm("show", "compression", "--json")[1])["name"] == "Compression"
    assert json.loads(effllm("show", "rtn-2018", "--json")[1])["title"] == "Integers & more: 5% of $100_x"


def test_texts_are_shown_as_they_are_written(effllm, small, folders, monkeypatch):
    """What Rich takes for markup and Markdown for emphasis stays: brackets, formulas; an unmatched `[/]` is no error."""
    awkward = "[bold]x[/] takes [out, in] to [/] and [/red]"
    formula = r"\|W_{:,i}\|_2^2 \, a_1 * b_2 * c [x_i]"
    for name in (GPTQ, RTN, AWQ):
        change(small, name, "summary: What", f"summary: '{awkward}'\n#")
    change(small, GPTQ, "Long enough", f"It is ${formula}$, and\n  $$a_{{b}} = [c]_d$$ *too*; long enough")
    change(small, f"{LAYERS}/_category.yaml", "What it is about,", f"On ${formula}$ {awkward},")
    change(small, f"{LAYERS}/_category.yaml", "name: Weights only", f"name: '{awkward}'")
    change(small, "papers/2023.yaml", "title: 'GPTQ: Accurate'", f"title: '{awkward}'")
    change(small, RTN, "says: No weight", f"says: '{awkward}'\n#")
    assert taxonomy.validate(small) == []
    monkeypatch.setattr(cli.out, "width", 200)  # so that no cell of a table is broken
    for arguments in (["show", "gptq"], ["show", LAYERS], ["search", "takes"], ["papers"], ["tree"], ["claims"]):
        code, out, err = effllm(*arguments)
        assert (code, err) == (0, "")
        assert awkward in words(out), arguments
    for name in ("gptq", LAYERS):
        assert formula in words(effllm("show", name)[1])
    assert "a_{b} = [c]_d too; long enough" in words(effllm("show", "gptq")[1])


# search


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["lora"], ["lora", "qlora", "dora-x"]),
        (["what", "rtn", "does"], ["rtn"]),
        (["-c", "compression"], ["rtn", "gptq", "awq"]),
        (["--tag", "awq-like"], ["awq"]),
        (["--year", 2023], ["awq", "dora-x", "qlora"]),
        (["--venue", "neurips"], ["dora-x", "qlora"]),
        (["--relation", "builds_on:lora"], ["dora-x", "qlora"]),
        (["--implemented"], ["rtn"]),
        (["-f", "calibration=yes"], ["gptq"]),
        (["-f", "calibration=true", "--facet", "training=none"], ["gptq"]),
        (["-f", "stage=prefill"], ["gptq"]),
        (["-f", "frees-memory=no"], []),
        (["-f", "gqa=null", "-c", LAYERS], ["rtn", "gptq"]),
    ],
)
def test_search(effllm, arguments, found):
    """The table and the JSON name the same methods in the same order."""
    code, out, err = effllm("search", *arguments)
    assert re.findall(r"^[●○]  ([a-z-]+) ", out, re.MULTILINE) == found
    assert (code, err) == ((0, "") if found else (1, "nothing found\n"))
    code, out, _ = effllm("search", *arguments, "--json")
    assert code == 0
    assert [m["id"] for m in json.loads(out)] == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gtpq"], "nothing found; did you mean 'gptq'?"),
        (["--tag", "post-trainin"], "nothing found; did you mean 'post-training'?"),
        (["zzzzz"], "nothing found"),
    ],
)
def test_search_that_finds_nothing_says_what_is_near(effllm, arguments, said):
    assert effllm("search", *arguments) == (1, "", said + "\n")


# papers


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ([], ["awq", "gptq", "qlora", "lora", "rtn-2018"]),
        (["lora"], ["qlora", "lora"]),
        (["émile"], ["lora"]),
        (["of", "weights"], ["awq"]),
        (["-c", "compression"], ["awq", "gptq", "rtn-2018"]),
        (["--year", 2018], ["rtn-2018"]),
        (["--venue", "iclr"], ["gptq", "lora"]),
        (["--method", "qlora"], ["qlora", "lora"]),
    ],
)
def test_papers_in_every_form(effllm, small, arguments, keys):
    """Oracles: Python's parsers of CSV and JSON; `Taxonomy.bibtex`."""
    tree = taxonomy.load(small)
    code, out, _ = effllm("papers", *arguments)
    assert code == 0
    assert re.findall(r"^([a-z0-9-]+) +\d{4}  ", out, re.MULTILINE) == keys
    assert out.endswith(f"\n{len(keys)} of 5 papers\n")
    assert [p["key"] for p in json.loads(effllm("papers", *arguments, "--json")[1])] == keys
    assert effllm("papers", *arguments, "--bibtex")[1] == tree.bibtex(keys)
    rows = list(csv.DictReader(io.StringIO(effllm("papers", *arguments, "--csv")[1])))
    assert [row["key"] for row in rows] == keys
    for row in rows:
        paper = tree.papers[row["key"]]
        assert (row["title"], row["year"], row["venue"]) == (paper.title, str(paper.year), paper.venue)
        assert (row["arxiv"], row["code"]) == (paper.arxiv or "", paper.code or "")
        assert row["categories"].split() == paper.categories


def test_papers_that_are_not_there(effllm):
    assert effllm("papers", "zzzz") == (1, "", "nothing found\n")
    assert effllm("papers", "zzzz", "--json") == (0, "[]\n", "")


# graph


def test_graph(effllm, tmp_path):
    pytest.importorskip("taxonomy.graph")
    code, out, _ = effllm("graph", "--around", "gptq")
    assert code == 0
    assert "rtn" in out
    assert "qlora" not in out
    assert json.loads(effllm("graph", "--format", "json")[1])
    for suffix in ("svg", "dot", "mmd", "graphml", "json"):
        code, out, err = effllm("graph", "-c", "compression", "-o", tmp_path / f"g.{suffix}")
        assert (code, out) == (0, "")
        assert re.search(r"\d+ nodes, \d+ edges", words(err))
        assert "gptq" in (tmp_path / f"g.{suffix}").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--around", "gtpq"], "did you mean 'gptq'?"),
        (["--relation", "build_on"], "did you mean 'builds_on'?"),
        (["-c", "compresion"], "did you mean 'compression'?"),
        (["--format", "svgg"], "svg"),
        (["--format", "svg", "--layout", "round"], "radial"),
        (["-o", "/nowhere/at/all/g.svg"], "/nowhere/at/all/g.svg"),
    ],
)
def test_graph_that_cannot_be_drawn(effllm, arguments, said):
    pytest.importorskip("taxonomy.graph")
    code, out, err = effllm("graph", *arguments)
    assert (code, out) == (1, "")
    assert said in err


# check


def test_check_of_what_is_valid(effllm, small):
    valid = "valid: 5 papers, 6 categories, 6 methods (1 run), 1 frameworks\n"
    assert effllm("check") == (0, valid, "")
    assert effllm("check", small) == (0, valid, "")
    assert effllm("check", "--json") == (0, "[]\n", "")


def test_check_lists_all_problems_with_places_that_can_be_opened(effllm, small):
    """Oracle: `taxonomy.validate`; the path before the first colon is a file."""
    change(small, GPTQ, "name: GPTQ", "nome: GPTQ")
    change(small, AWQ, "gqa: true", "gqa: [")
    change(small, LORA, "papers: [lora]", "papers: [lola]")
    problems = taxonomy.validate(small)
    assert len(problems) == 3
    code, out, err = effllm("check", small)
    assert (code, err) == (1, "3 problems\n")
    assert out.splitlines() == [f"{small / p.file}:{p.line}:{p.column}: {p.message}" for p in problems]
    assert all(Path(line.partition(":")[0]).is_file() for line in out.splitlines())
    code, out, _ = effllm("check", "--json")
    assert code == 1
    assert [p["message"] for p in json.loads(out)] == [p.message for p in problems]


def test_check_of_no_tree(effllm, tmp_path):
    code, out, err = effllm("check", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert "is not a folder; give the folder that holds the YAML files" in err
    (tmp_path / "empty").mkdir()
    code, out, _ = effllm("check", tmp_path / "empty")
    assert code == 1
    assert "no YAML file below this folder" in out


@pytest.mark.parametrize("command", [["tree"], ["show", "gptq"], ["search", "x"], ["papers"], ["claims"], ["run"]])
def test_commands_on_a_broken_tree_say_so(effllm, small, command):
    for i in range(12):
        (small / f"finetuning/m{i}.yaml").write_text("[")
    code, out, err = effllm(*command)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 11  # ten of them, and how many there are
    assert err.startswith("finetuning/m0.yaml:1:2: not valid YAML")
    assert err.endswith("error: 12 problems in the taxonomy; `effllm check` lists all of them\n")


# claims


def test_claims(effllm, folders):
    code, out, _ = effllm("claims")
    assert code == 0
    assert "rtn/error-bound" in out
    assert "not measured yet" in out
    (folders / "committed_folder").mkdir()
    measured = {"claims": [{"method": "rtn", "claim": "error-bound", "value": 0.123456, "holds": True}]}
    (folders / "committed_folder/claims.json").write_text(json.dumps(measured))
    out = effllm("claims", "RTN")[1]
    assert "0.1235" in out
    assert "holds" in out
    rows = json.loads(effllm("claims", "--json")[1])
    assert [(r["method"], r["id"], r["value"], r["held"]) for r in rows] == [
        ("rtn", "error-bound", 0.123456, True),
        ("rtn", "groups", None, None),
    ]
    assert json.loads(effllm("claims", "gptq", "--json")[1]) == []


def test_claims_are_measured_in_a_checkout_only(effllm, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path / "wheel")
    code, _, err = effllm("claims", "--measure")
    assert code == 1
    assert "claims are measured by the tests, which stand in a checkout" in err


def test_claims_of_a_broken_document(effllm, folders):
    (folders / "fresh_folder").mkdir()
    (folders / "fresh_folder/claims.json").write_text('{"claims": [')
    code, _, err = effllm("claims")
    assert code == 1
    assert "claims.json is not whole" in err
    assert "delete it and run again" in err


# run and bench


@pytest.fixture
def measuring(effllm, small, folders, monkeypatch):
    """The small tree, whose one method runs; the store and the documents in a folder of this test."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # a plugin's directory is added to it
    return effllm


@pytest.fixture
def figures(folders):
    return folders / "fresh_folder"


def document(path):
    return json.loads(path.read_text())


def test_run_stores_and_shows_the_figures_in_the_quick_form(measuring, figures):
    """Oracle: the files that it wrote; the baseline stands beside the method."""
    code, out, err = measuring("run", "rtn", "--seeds", 2)
    assert code == 0
    found = document(figures / "weights.json")
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [
        ("16 bit", 0),
        ("16 bit", 1),
        ("rtn", 0),
        ("rtn", 1),
    ]
    assert found["quick"] is True and found["seeds"] == [0, 1]
    assert found["about"] in words(out)
    assert "weights, quick form" in out and "16 bit" in out
    assert words(err) == f"stored in {figures / 'weights.json'}"
    assert (figures / "bench.sqlite").is_file()


def test_run_again_reads_what_is_stored(measuring, figures, monkeypatch):
    """Oracle: the arena, which is not to be called a second time."""
    from refimpl.arena import weights

    first = measuring("run", "rtn")[1]
    monkeypatch.setattr(weights, "measure", None)
    assert measuring("run", "rtn")[1] == first
    assert measuring("run", "rtn", "--seeds", 2)[0] == 1  # a cell that is not stored


def test_run_of_all_as_json(measuring, folders):
    code, out, _ = measuring(
        "run", "-o", folders / "elsewhere", "--store", folders / "my.sqlite", "--jobs", 1, "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert {row["method"] for row in found["rows"]} == {"16 bit", "rtn"}
    assert [line["method"] for line in found["summary"]] == ["16 bit", "rtn"]
    assert sorted(path.name for path in folders.iterdir() if path.name in ("elsewhere", "my.sqlite", "fresh_folder")) == [
        "elsewhere", "my.sqlite",
    ]  # fmt: skip


def test_run_of_all_passes_over_what_is_in_no_arena(measuring, small):
    change(small, RTN, "arena: ", "#")
    assert measuring("run") == (0, "", "")


def test_run_shows_a_method_that_fails_and_fails_too(measuring, small):
    change(small, RTN, "bits: [4]", "bits: [-1]")
    code, out, err = measuring("run", "rtn", "--seeds", 2)
    assert code == 1
    assert "weights, rtn {'bits': -1, 'group_size': 32} and 1 more: ValueError: bits=-1 must be 1 to 8" in words(err)
    assert "failed" in out


def test_a_fault_that_several_methods_meet_is_told_once(capsys):
    """Oracle: by hand. Two methods fail in the same way, one of them twice, and one in another way."""
    row = partial(Row, arena="a", seed=0, figures={})
    rows = [row(method="none", settings={}, axes={"task": "x"}, error="ValueError: texts:3: no line")]
    rows += [row(method="m", settings={"b": b}, error="ValueError: texts:3: no line") for b in (1, 2)]
    rows += [row(method="m", settings={"b": 3}, error="ValueError: b=3")]
    cli._show_failures(rows)
    err = words(capsys.readouterr().err)
    assert "a, none {'task': 'x'} and 2 more, also of m: ValueError: texts:3: no line" in err
    assert err.count("texts:3") == 1 and "a, m {'b': 3}: ValueError: b=3" in err


def test_a_failure_is_kept_and_run_again_on_request(measuring, small, monkeypatch):
    """Oracle: the arena, broken and mended; a failure that is stored is told until `--retry`."""
    from refimpl.arena import weights

    right = weights.measure

    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(weights, "measure", broken)
    assert measuring("run", "rtn")[0] == 1
    monkeypatch.setattr(weights, "measure", right)
    code, _, err = measuring("run", "rtn")
    assert code == 1 and "MemoryError: no room" in err
    assert measuring("run", "rtn", "--retry")[0] == 0
    assert measuring("run", "rtn")[0] == 0


def test_bench_runs_the_whole_grid_with_three_seeds(measuring, small, figures):
    """Oracle: by hand. The baseline and two settings, three seeds each; the quick form then leaves the document as it is."""
    change(small, RTN, "bits: [4]", "bits: [4, 2]")
    code, out, _ = measuring("bench", "weights", "--jobs", 1)
    assert code == 0
    found = document(figures / "weights.json")
    assert len(found["rows"]) == 9 and "quick" not in found and found["seeds"] == [0, 1, 2]
    assert "±" in out and "rtn    bits 2," in out
    before = (figures / "weights.json").read_bytes()
    code, out, err = measuring("run", "rtn")
    assert code == 0 and "quick form" in out
    assert "weights.json holds the full form's figures, and stays" in words(err)
    assert (figures / "weights.json").read_bytes() == before


def test_bench_of_chosen_methods_in_a_dashed_arena(measuring, folders, monkeypatch, figures):
    from refimpl.bench import cells

    monkeypatch.setattr(cells, "arenas", lambda: ["weights", "wei_ghts"])
    monkeypatch.setitem(sys.modules, "refimpl.arena.wei_ghts", cells.open_arena("weights"))
    code, _, err = measuring("bench", "wei-ghts", "--methods", "rtn", "--quick")
    assert code == 1
    assert "'rtn' is not in the arena wei_ghts; its arenas: weights" in err
    assert measuring("bench", "weights", "--methods", "RTN", "--quick")[0] == 0
    assert {row["method"] for row in document(figures / "weights.json")["rows"]} == {"16 bit", "rtn"}


PLUGIN = """
from refimpl.compression.quantization.weight_only.rtn import RTN

class Mine(RTN):
    ARENA = {"bits": [3, 5]}

class Other:
    def __call__(self, weight, inputs):
        raise KeyError("mine")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with somebody's module."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/my_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    sys.modules.pop("my_plugin", None)


def test_bench_of_a_plugin_beside_the_methods(measuring, here, figures):
    """Oracle: its figures are RTN's at the same settings."""
    code, out, _ = measuring("bench", "weights", "--plugin", "my_plugin:Mine", "--seeds", 1, "--jobs", 1)
    assert code == 0
    found = document(figures / "weights.json")
    assert [(row["method"], row["settings"]) for row in found["rows"]] == [
        ("16 bit", {}), ("my_plugin:Mine", {"bits": 3}), ("my_plugin:Mine", {"bits": 5}), ("rtn", {"bits": 4, "group_size": 32}),
    ]  # fmt: skip
    assert "my_plugin:" in out
    errors = [row["figures"]["output_error"] for row in found["rows"]]
    assert errors[0] < errors[2] < errors[1] < 1


def test_a_plugin_that_fails_is_told_how_methods_are_called(measuring, here):
    code, _, err = measuring("bench", "weights", "--plugin", "my_plugin:Other", "--quick", "--jobs", 1)
    assert code == 1
    assert "weights, my_plugin:Other {}: KeyError: 'mine'" in err
    assert "refimpl/compression/protocol.py" in err


def test_bench_exports(measuring, folders):
    """Oracle: the files, by other people's parsers."""
    files = [folders / f"x.{kind}" for kind in ("json", "csv", "html")]
    code, _, _ = measuring(
        "bench", "weights", "--quick", "--jobs", 1, *(part for f in files for part in ("--export", f))
    )
    assert code == 0
    found = document(files[0])
    assert {"commit", "dirty", "torch", "device", "threads"} <= found["environment"].keys()
    assert found["seeds"] == [0] and len(found["summary"]) == 2
    lines = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [float(line["output_error"]) for line in lines] == [row["figures"]["output_error"] for row in found["rows"]]
    assert "Plotly.newPlot" in files[2].read_text()


def test_bench_lists_the_arenas(measuring):
    code, out, _ = measuring("bench")
    assert code == 0
    assert re.search(r"^weights +1 +2 +2 ", out, re.MULTILINE)
    [weights] = [arena for arena in json.loads(measuring("bench", "--json")[1]) if arena["arena"] == "weights"]
    assert weights["methods"] == ["rtn"] and (weights["cells"], weights["quick_cells"]) == (2, 2)
    assert weights["about"].endswith(".") and weights["axes"] == {}


def test_bench_of_all_arenas(measuring, monkeypatch, figures):
    from refimpl.bench import cells

    monkeypatch.setattr(cells, "arenas", lambda: ["attention", "weights"])
    code, out, _ = measuring("bench", "all", "--quick", "--jobs", 1)
    assert code == 0
    assert out.index("attention, quick form") < out.index("weights, quick form")
    assert {path.name for path in figures.glob("*.json")} == {"attention.json", "weights.json"}


def test_a_model_that_an_arena_cannot_use(measuring, tmp_path, figures):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    code, _, err = measuring("run", "rtn", "--model", tmp_path / "model")
    assert code == 1
    assert "this arena's substrate is synthetic" in words(err)
    assert document(figures / "weights-on-model.json")["model"] == "model"


def test_texts_that_are_not_there_or_not_taken(measuring, tmp_path):
    (tmp_path / "texts").mkdir()
    for arena, texts, message in (
        ("long-context", tmp_path / "none", "is no folder; give one with LongBench's files"),
        ("long-context", tmp_path / "texts", "holds neither LongBench's files (qasper.jsonl, …) nor prose (*.txt)"),
        ("weights", tmp_path / "texts", "this arena takes no texts of the user's; leave the option out"),
    ):
        code, out, err = measuring("bench", arena, "--texts", texts)
        assert (code, out) == (1, "")
        assert message in words(err)


def test_ray_that_is_not_installed_is_named(measuring, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = measuring("bench", "weights", "--engine", "ray")
    assert (code, out) == (1, "")
    assert err == "error: this needs ray; install it with `pip install '.[ray]'` in a checkout\n"


def test_plotly_that_is_not_installed_is_named(measuring, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, out, err = measuring("bench", "weights", "--export", tmp_path / "x.html")
    assert (code, out) == (1, "")
    assert err == "error: this needs plotly; install it with `pip install '.[docs]'` in a checkout\n"


def test_a_store_that_is_something_else_is_named(measuring, tmp_path):
    (tmp_path / "file").write_text("no database " * 99)
    code, out, err = measuring("run", "rtn", "--store", tmp_path / "file")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"error: {tmp_path / 'file'} is no store of effllm" in err


WAITS = """
import os
import signal
class Waits:
    ARENA = {"n": [1]}
    def __init__(self, n): pass
    def __call__(self, weight, inputs):
        os.kill(os.getpid(), signal.SIGINT)  # a process that heard it would stop here
        os.write(1, b"waiting\\n")
        signal.pause()
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_says_what_is_stored(tmp_path, jobs):
    """Real processes, all of which get the signal, as from a terminal; nothing but that line is said."""
    (tmp_path / "my_waits.py").write_text(WAITS)
    command = [sys.executable, "-m", "refimpl.cli", "bench", "weights", "--quick", "--jobs", jobs, "--methods", "rtn"]
    command += ["--plugin", "my_waits:Waits", "--store", str(tmp_path / "b.sqlite"), "-o", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted: [12] of 3 cells are stored; the same command goes on from there\n", err)
    assert jobs == "2" or "2 of 3" in err
    assert not (tmp_path / "weights.json").exists()


# new


def test_new(effllm, small):
    code, out, _ = effllm("new", f"{LAYERS}/hqq", "--root", small.parent)
    assert code == 0
    for path in (
        small / LAYERS / "hqq.yaml",
        small.parent / "refimpl" / LAYERS / "hqq.py",
        small.parent / "tests" / LAYERS / "test_hqq.py",
    ):
        assert path.is_file()
        assert f"wrote {path}" in out.replace("\n", "") or str(path) in out.replace("\n", "")
    code, out, _ = effllm("check", small)
    assert code == 1
    assert "hqq.yaml:3:1: " in out


# How it fails


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "gtpq"], 1, "unknown method, category, framework or paper 'gtpq'; did you mean 'gptq'? (`effllm tree`, `effllm papers` list them)"),
        (["show", "compresion"], 1, "unknown method, category, framework or paper 'compresion'; did you mean 'compression'?"),
        (["show", "rtn-2019"], 1, "did you mean 'rtn-2018'?"),
        (["show", "zzzz"], 1, "unknown method, category, framework or paper 'zzzz' (`effllm tree`"),
        (["show", ""], 1, "unknown method, category, framework or paper ''"),
        (["show", "[/bold]"], 1, "'[/bold]'"),
        (["tree", "compresion"], 1, "unknown category 'compresion'; did you mean 'compression'? (`effllm tree --depth 2` lists them)"),
        (["tree", "weight_only"], 1, f"unknown category 'weight_only'; did you mean '{LAYERS}'?"),
        (["search", "-c", "fine"], 1, "unknown category 'fine'"),
        (["papers", "-c", "finetunin"], 1, "did you mean 'finetuning'?"),
        (["papers", "--method", "gptk"], 1, "unknown method 'gptk'; did you mean 'gptq'? (`effllm tree` lists all)"),
        (["search", "-f", "exakt=no"], 1, "--facet 'exakt=no' must be name=value; names: stage, training, calibration"),
        (["search", "-f", "exact"], 1, "--facet 'exact' must be name=value"),
        (["search", "-f", "training=no"], 1, "facet 'training' is never False; it is one of none, partial, full"),
        (["search", "-f", "stage=decoding"], 1, "facet 'stage' is never 'decoding'; it is one of data, pre-training"),
        (["search", "--relation", "build_on"], 1, "unknown relation 'build_on'; did you mean 'builds_on'?"),
        (["search", "--relation", "builds_on:loar"], 1, "unknown method 'loar'; did you mean 'lora'?"),
        (["claims", "rtm"], 1, "unknown method 'rtm'; did you mean 'rtn'?"),
        (["claims", "rtn", "-o", "x.json"], 1, "--output 'x.json' is where measured claims are stored; give --measure, too"),
        (["graph", "--json", "-o", "x.svg"], 1, "--output 'x.svg': its suffix names another format than json; leave one of them out"),
        (["graph", "--format", "svgg", "-o", "x.svg"], 1, "unknown format 'svgg'; did you mean 'svg'?"),
        (["graph", "--json", "--format", "svg"], 1, "--json and --format svg exclude each other; give one of them"),
        (["graph", "--format", "dot", "-o", "x.graphml"], 1, "its suffix names another format than dot"),
        (["run", "rtm"], 1, "unknown method 'rtm'; did you mean 'rtn'?"),
        (["run", "gptq"], 1, "'gptq' has no implementation yet (`effllm tree --implemented` lists those that run)"),
        (["run", "rtn", "gptq"], 1, "'gptq' has no implementation yet"),
        (["run", "rtn", "--device", "warp"], 1, "--device 'warp' cannot be used here: "),
        (["run", "rtn", "--device", "cuda:99"], 1, "--device 'cuda:99' cannot be used here: "),
        (["run", "rtn", "--model", "/nowhere/model"], 1, "--model '/nowhere/model' is no folder; give the local folder of a Hugging Face"),
        (["run", "rtn", "--model", "/proc"], 1, "--model '/proc' has no config.json"),
        (["bench", "wieghts"], 1, "unknown arena 'wieghts'; did you mean 'weights'? (`effllm bench` lists all)"),
        (["bench", "weights", "--methods", "rtm"], 1, "unknown method 'rtm'; did you mean 'rtn'?"),
        (["bench", "weights", "--methods", "rtn,gptq"], 1, "'gptq' has no implementation yet"),
        (["bench", "attention", "--methods", "rtn"], 1, "'rtn' is not in the arena attention; its arenas: weights"),
        (["bench", "weights", "--engine", "dask"], 1, "--engine 'dask' must be one of loky, ray"),
        (["bench", "weights", "--plugin", "mine"], 1, "'mine' must be package.module:Class"),
        (["bench", "weights", "--plugin", "no_such_module:Mine"], 1, "no module 'no_such_module' in "),
        (["bench", "weights", "--export", "x.doc"], 1, "--export 'x.doc' must end in .json, .csv, .html"),
        (["bench", "weights", "--device", "warp"], 1, "--device 'warp' cannot be used here: "),
        (["bench", "weights", "--jobs", "0"], 2, "--jobs"),
        (["new", "compresion/x"], 1, "no category 'compresion'; did you mean 'compression'?"),
        (["new", "x"], 1, "'x' is no category and id; give CATEGORY/ID"),
        (["new", "compression/Not Good"], 1, "id 'Not Good' must be lower-case letters, digits and single hyphens"),
        (["new", f"{LAYERS}/rtn"], 1, f"id 'rtn' is taken by taxonomy/{LAYERS}/rtn.yaml"),
        (["search", "--year", "soon"], 2, "--year"),
        (["papers", "--year", "soon"], 2, "--year"),
        (["tree", "--depth", "0"], 2, "--depth"),
        (["run", "--seeds", "0"], 2, "--seeds"),
        (["shwo", "gptq"], 2, "show"),
        (["show"], 2, "id"),
        (["show", "--jsn", "gptq"], 2, "--json"),
        (["graph", "--depth", "x"], 2, "--depth"),
        ([], 2, "Usage"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_said_in_one_line(effllm, small, tmp_path, arguments, code, said):
    """No traceback, nothing on the standard output, and no report of a fault."""
    if arguments[:1] == ["new"]:
        arguments = [*arguments, "--root", small.parent]
    left, out, err = effllm(*arguments)
    assert left == code
    assert said in (words(out + err) if code == 2 else err)
    if code == 1:
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert list(tmp_path.glob("effllm-*")) == []


def test_a_method_in_no_arena_cannot_be_run_by_name(effllm, small):
    change(small, RTN, "arena: ", "#")
    code, _, err = effllm("run", "rtn")
    assert code == 1
    assert f"'rtn' has joined no arena; add `arena:` to taxonomy/{RTN}" in err


def test_a_fault_of_our_own_is_written_down(effllm, monkeypatch, tmp_path):
    """One line and exit code 70; the traceback is in a file that can be sent."""

    def broken(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(taxonomy, "load", broken)
    code, out, err = effllm("tree")
    assert (code, out) == (70, "")
    (report,) = tmp_path.glob("effllm-*.txt")
    assert err == f"error: this is a fault of effllm (RuntimeError); please report {report}\n"
    assert "RuntimeError: a fault" in report.read_text()


def test_an_interrupt_ends_quietly(effllm, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(taxonomy, "load", interrupt)
    assert effllm("tree") == (130, "", "")


def test_help_of_every_command(effllm):
    code, out, _ = effllm("--help")
    assert code == 0
    for command in ("tree", "show", "search", "papers", "graph", "check", "claims", "run", "bench", "new"):
        assert re.search(rf"^│ {command} ", out, re.MULTILINE)
        assert effllm(command, "-h")[0] == 0


# Width


def test_everything_is_readable_at_80_columns(effllm, small):
    """No line is longer, and nothing is cut off: every id is there, no ellipsis."""
    long_id = "a-method-with-a-name-that-is-far-longer-than-most"
    (small / f"finetuning/{long_id.replace('-', '_')}.yaml").write_text(FILES[LORA], encoding="utf-8")
    commands = [
        ["tree"],
        ["show", "gptq"],
        ["show", LAYERS],
        ["show", long_id],
        ["search"],
        ["papers"],
        ["claims"],
        ["check"],
    ]
    for arguments in commands:
        code, out, _ = effllm(*arguments)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80, arguments
        assert "…" not in out, arguments
    assert long_id in effllm("search")[1]
    assert long_id in effllm("tree")[1]


@pytest.mark.slow
def test_every_page_of_the_real_tree_is_readable_at_80_columns():
    """Each method and each category: shown whole, its formulas in the letters of its file."""
    tree = taxonomy.load()
    for entry in [*tree.methods.values(), *tree.categories.values()]:
        page = Console(width=80, file=io.StringIO())
        page.print((views.method_view if entry.id in tree.methods else views.category_view)(tree, entry))
        out = page.file.getvalue()
        assert max(map(len, out.splitlines())) <= 80, entry.id
        prose = entry.idea + entry.when if entry.id in tree.methods else entry.text
        shown = re.sub(r"\s", "", out)
        for _, formula in re.findall(r"(\$\$?)([^$]+)\1", prose):
            assert re.sub(r"\s", "", formula) in shown, (entry.id, formula)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12800, "12,800"), (12800.4, "12,800"), (0.03123, "0.03123"), (5.2e-6, "5.2e-06"), (-3.0, "-3"), (1e20, "100,000,000,000,000,000,000"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers(value, text):
    assert views.number(value) == text


def test_figures_are_means_over_seeds_with_their_spread():
    """Oracle: by hand, (1 + 2) / 2 = 1.5 and (2 - 1) / 2 = 0.5; a failed cell says so."""

    def row(method, seed, error=None, **figures):
        return {"method": method, "settings": {"b": 1}, "seed": seed, "figures": figures, "error": error}  # fmt: skip

    rows = [row("m", 0, e=1.0), row("m", 1, e=2.0), row("n", 0, error="Boom: x"), row("o", 0, e=5.0)]
    assert [len(group) for group in views.group_rows(rows)] == [2, 1, 1]
    assert views.mean_text(rows[:2], "e") == "1.5 ±0.5"
    assert views.mean_text(rows[3:], "e") == "5"
    assert views.mean_text(rows[:2], "unknown") == "–"
    document = {"rows": rows, "metrics": [{"name": "e"}], "baseline": "o"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(views.figures_view(document, {"m", "n"}, 80))
    assert [line.split() for line in console.export_text().splitlines()] == [
        ["method", "settings", "e"],
        ["m", "b", "1", "1.5", "±0.5"],
        ["n", "b", "1", "failed"],
        ["o", "b", "1", "5"],
    ]
    assert views.settings_text({"settings": {"group_size": 32, "bits": 4}}) == "group size 32, bits 4"


# Whole processes


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For processes of their own: 80 columns, output buffered as usual, the real tree compiled in a cache of the tests."""
    cache = str(tmp_path_factory.mktemp("cache"))
    variables = {**os.environ, "XDG_CACHE_HOME": cache, "COLUMNS": "80", "PYTHONUNBUFFERED": ""}
    subprocess.run(
        [sys.executable, "-m", "refimpl.cli", "tree"], cwd=ROOT, env=variables, capture_output=True, check=True
    )
    return variables


@pytest.mark.parametrize(
    "arguments", [["show", "gptq"], ["search", "attention"], ["tree", "compression"], ["papers", "--bibtex"], ["--help"]], ids=" ".join
)  # fmt: skip
def test_a_question_starts_without_what_it_does_not_need(environment, arguments):
    """Oracle: the interpreter's own list of what the whole process imported."""
    command = [sys.executable, "-X", "importtime", "-m", "refimpl.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"typer", "msgspec", "refimpl"} <= imported | {"refimpl"}
    assert not imported & {"torch", "numpy", "networkx", "yaml", "transformers", "joblib", "pandas", "tools"}
    assert done.stdout.strip()


def test_the_installed_command_is_the_same(environment):
    """`effllm` of the environment, where there is one."""
    command = Path(sys.executable).with_name("effllm")
    if not command.exists():
        pytest.skip("effllm is not installed beside this interpreter")
    done = subprocess.run([command, "show", "gtpq"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean 'gptq'?" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["papers", "--bibtex"], ["papers"], ["papers", "--json"], ["show", "gptq"], ["show", "gptq", "--json"]], ids=" ".join
)  # fmt: skip
def test_a_reader_that_goes_away_is_no_error(environment, arguments):
    """The reading end is closed before anything is written; neither a long output nor a short one that is still buffered complains."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "refimpl.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_output_that_the_terminal_cannot_show_is_an_error_of_one_line(environment):
    """An encoding without the signs of the tree."""
    command = [sys.executable, "-m", "refimpl.cli", "tree"]
    variables = {**environment, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert "ascii" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_show_a_framework(effllm):
    """Oracle: its file."""
    code, out, _ = effllm("show", "peft")
    assert code == 0
    assert out.startswith("PEFT\nAdapters for everybody.\n")
    assert "ships     lora" in out
    assert json.loads(effllm("show", "peft", "--json")[1])["libraries"] == ["PyTorch"]
