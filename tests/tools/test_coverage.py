import io
import json
import textwrap

import pytest
from rich.console import Console
from typer.testing import CliRunner

import taxonomy
from tools.coverage import check
from tools.graph import app

TEXT = "What it is about, what its methods trade, how they differ. " * 6
FACETS = "{stage: [decode], training: none, calibration: false, exact: true, frees_memory: true, changes_architecture: false}"


class Repository:
    """A small checkout in a temporary folder: three categories, three methods of which two run, five papers."""

    def __init__(self, root):
        self.root = root
        self.write("taxonomy/survey.yaml", "s: All\ns/a: A\ns/a/x: X of A\ns/b: B\n")
        self.category("a", 1, "survey_path: [s/a]")
        self.category("a/x", 1)
        self.category("b", 2, "survey_path: [s/b]")
        self.method("a", "deep", ["p1"], "impl: Deep", "claims: [" + self.claim("one") + ", " + self.claim("two") + "]")
        self.method("a/x", "deeper-still", ["p2", "p1"], "impl: Still", "claims: [" + self.claim("one") + "]")
        self.method("b", "later", ["p3"])
        self.papers(
            p1="categories: [a]\n  listed: [s/a]",
            p2="categories: [a/x, b]\n  listed: [s/b]",
            p3="categories: [b]",
            p4="categories: [a/x]\n  listed: [s/a]",
            p5="categories: [b]",
        )
        self.code("a/deep", "class Deep: pass\n", '"""Oracle: by hand."""\n')
        self.code(
            "a/x/deeper_still",
            "def Still(): pass\n",
            'def test_it():\n    """It works.\n\n    Oracle: brute force.\n    """\n',
        )
        self.write("refimpl/a/protocol.py", "")
        self.write("refimpl/a/__init__.py", "")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def category(self, place, order, more=""):
        text = f"name: Category {place}\nsummary: S.\norder: {order}\ntext: {TEXT}\n{more}\n"
        self.write(f"taxonomy/{place}/_category.yaml", text)

    def claim(self, name):
        return (
            f"{{id: {name}, says: It holds., source: {{paper: p1, where: Table 1}}, expect: {{above: 0, unit: ratio}}}}"
        )

    def method(self, place, name, papers, *more):
        text = f"name: {name}\nsummary: S.\npapers: {papers}\nidea: {TEXT}\nwhen: {TEXT}\nfacets: {FACETS}\n"
        self.write(f"taxonomy/{place}/{name.replace('-', '_')}.yaml", text + "\n".join(more) + "\n")

    def papers(self, **entries):
        common = "title: T\n  venue: arXiv\n  url: https://example.org/"
        self.write("taxonomy/papers/2020.yaml", "".join(f"{k}:\n  {common}\n  {more}\n" for k, more in entries.items()))

    def code(self, path, module, test):
        folder, _, name = path.rpartition("/")
        self.write(f"refimpl/{path}.py", module)
        self.write(f"tests/{folder}/test_{name}.py", test)

    def check(self, **more):
        return check(taxonomy.load(self.root / "taxonomy"), **more)

    def run(self, *words):
        return CliRunner().invoke(app, ["check", "--path", str(self.root / "taxonomy"), *words])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Repository(tmp_path)


def test_counts_roll_up_to_parents(repository):
    """Oracle: counted by hand."""
    report = repository.check(measured={("deep", "two"): 1.0, ("deeper-still", "one"): 0.5})
    assert report.problems == []
    rows = {row.category: row for row in [*report.rows, report.total]}
    assert list(rows) == ["a", "a/x", "b", ""]

    def numbers(place):
        row = rows[place]
        return (
            row.methods,
            row.implemented,
            row.oracle,
            row.measured,
            row.claims,
            row.pages,
            row.papers_implemented,
            row.papers,
        )

    assert numbers("a") == (2, 2, 2, 2, 3, 2, 2, 3)
    assert numbers("a/x") == (1, 1, 1, 1, 1, 1, 1, 2)
    assert numbers("b") == (1, 0, 0, 0, 0, 1, 1, 3)
    assert numbers("") == (3, 2, 2, 2, 3, 3, 2, 5)
    assert round(report.share, 1) == 66.7


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ('class TestIt:\n    """Oracle: a theorem."""\n', True),
        ('async def test_it():\n    """\n    Oracle: a theorem.\n    """\n', True),
        ("# Oracle: a comment is none\n", False),
        ('def test_it():\n    """No Oracle: named."""\n', False),
        ('def test_it():\n    x = 1\n    """Oracle: not a docstring."""\n', False),
        ("", False),
    ],
)
def test_an_oracle_is_named_by_a_docstrings_line(repository, source, counts):
    repository.write("tests/a/test_deep.py", source)
    report = repository.check()
    assert report.total.oracle == 1 + counts
    assert report.problems == []


def test_measured_values_come_from_the_results(repository):
    assert repository.check().total.measured == 0
    rows = [
        {"method": "deep", "claim": "one", "value": 1.5, "holds": True},
        {"method": "deep", "claim": "two", "value": None},
    ]
    repository.write("docs/results/claims.json", json.dumps({"claims": rows, "environment": {"commit": "abc"}}))
    report = repository.check()
    assert (report.total.measured, report.problems) == (1, [])
    repository.write(
        "docs/results/claims.json", json.dumps({"claims": [{"method": "deep", "claim": "onne", "value": 1}]})
    )
    assert repository.check().problems == [
        "docs/results/claims.json: unknown claim 'deep/onne'; did you mean 'deep/one'?"
    ]
    repository.write("docs/results/claims.json", '{"claims": [{"method": 3}]}')
    (problem,) = repository.check().problems
    assert problem.startswith("docs/results/claims.json: cannot be read")


def test_drift_from_the_survey(repository):
    """Oracle: by hand. Only `a` stands for s/a, so that a paper of a/x is in its place, and one of b alone is not."""
    drift = repository.check().drift
    assert (drift.headings, drift.papers, drift.ours_alone) == (["s", "s/a/x"], [], ["a/x"])
    moved = "categories: [b]\n  listed: [s/a]"
    repository.papers(
        p1=moved,
        p2=f"{moved}\n  corrections: [{{kind: misfiled, evidence: it is about B}}]",
        p3=f"{moved}\n  corrections: [{{kind: form}}]",
        p4="categories: [a/x]\n  listed: [s/a, s/b]",
        p5="categories: [a/x, b]\n  listed: [s/a/x, s/b]",
    )
    assert repository.check().drift.papers == [("p1", "s/a"), ("p3", "s/a"), ("p4", "s/b"), ("p5", "s/a/x")]
    output = repository.run().output
    assert "papers filed elsewhere than the survey's list has them: 4" in output
    assert "p4 (listed under s/b)" in output
    assert repository.run().exit_code == 0


def test_an_implemented_method_needs_its_test(repository):
    (repository.root / "tests/a/x/test_deeper_still.py").unlink()
    report = repository.check()
    assert report.problems == [
        "tests/a/x/test_deeper_still.py: not there, but a/x/deeper_still is implemented; write it"
    ]
    assert report.total.oracle == 1
    result = repository.run()
    assert result.exit_code == 1
    assert report.problems[0] in result.output
    repository.write("tests/a/x/test_deeper_still.py", "def broken(:\n")
    (problem,) = repository.check().problems
    assert problem.startswith("tests/a/x/test_deeper_still.py: cannot be read: ")


def test_a_module_needs_a_leaf_or_a_test(repository):
    repository.write("refimpl/a/shared.py", "")
    repository.write("refimpl/later.py", "")  # `later` is a leaf of b, not of the root
    assert repository.check().problems == [
        "refimpl/a/shared.py: neither taxonomy/a/shared.yaml nor tests/a/test_shared.py is there; write one of them",
        "refimpl/later.py: neither taxonomy/later.yaml nor tests/test_later.py is there; write one of them",
    ]
    repository.write("tests/a/test_shared.py", "")
    repository.write("refimpl/b/later.py", "")
    assert len(repository.check().problems) == 1


def test_a_test_in_a_category_needs_what_it_tests(repository):
    repository.write("tests/b/test_later.py", "")
    repository.write("tests/a/test_protocol.py", "")
    repository.write("tests/arena/test_anything.py", "")
    assert repository.check().problems == []
    repository.write("tests/a/test_depe.py", "")
    assert repository.check().problems == [
        "tests/a/test_depe.py: neither taxonomy/a/depe.yaml nor refimpl/a/depe.py is there; rename or remove it"
    ]


def test_command_fails_below_the_minimum(repository):
    assert repository.run().exit_code == 0
    assert repository.run("--min", "66").exit_code == 0
    result = repository.run("--min", "67")
    assert result.exit_code == 1
    assert result.output.endswith(
        "coverage is 66.7 %, below 67 % (2 of 3 methods run); implement more or lower --min\n"
    )


def test_json_holds_everything(repository):
    result = repository.run("--json", "--min", "80")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert [row["category"] for row in document["rows"]] == ["a", "a/x", "b"]
    assert document["total"]["implemented"] == 2
    assert document["drift"] == {"headings": ["s", "s/a/x"], "papers": [], "ours_alone": ["a/x"]}
    assert document["share"] == 66.67
    assert document["problems"] == []
    assert len(document["failures"]) == 1


def test_a_broken_file_fails_the_check_with_its_place(repository):
    repository.method("b", "later", ["p9"])
    result = repository.run()
    assert result.exit_code == 1
    assert isinstance(result.exception, taxonomy.InvalidTaxonomy)  # which the command line prints
    assert str(result.exception).startswith("b/later.yaml:3:10: unknown paper 'p9'; ")


def test_table_fits_a_terminal_and_shows_two_levels(repository):
    repository.category("a/x/y", 1)
    repository.write(
        "taxonomy/b/_category.yaml",
        f"name: {'A very long name ' * 10}end\nsummary: S.\norder: 2\ntext: {TEXT}\nsurvey_path: [s/b]\n",
    )
    report = repository.check()
    for depth, shown in ((2, 3), (9, 4)):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(report.table(depth))
        lines = console.export_text().splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 80
        assert sum(textwrap.dedent(line)[:1] in "CA" for line in lines) == shown
    assert "Category a/x/y" in repository.run("--all").output
    assert "Category a/x/y" not in repository.run().output


def test_long_lists_are_cut_unless_asked_for(repository):
    for i in range(15):
        repository.category(f"c{i}", i + 3)
    output = repository.run().output
    assert "categories that are ours alone: 16" in output
    assert "… and 6 more (--all)" in output
    assert "  c14\n" in repository.run("--all").output


def test_an_empty_taxonomy_counts_as_covered(make_forest, entries):
    tree = make_forest([entries.category("a")], [], [])
    (tree.root / "a").mkdir()
    assert check(tree).share == 100.0


def test_a_method_counts_as_measured_by_its_finished_rows(repository):
    """Oracle: by hand. One method has a row, one a failed row only, the baseline is no method."""
    rows = [{"method": "deep"}, {"method": "deeper-still", "error": "ValueError: no"}, {"method": "16 bit"}]
    repository.write("docs/results/weights.json", json.dumps({"arena": "weights", "rows": rows}))
    report = repository.check(measured={})
    assert {row.category: row.results for row in [*report.rows, report.total]} == {"a": 1, "a/x": 0, "b": 0, "": 1}


def test_nothing_is_broken_in_this_repository():
    """What `python -m tools.graph check` fails for: invalid files, modules and tests without their mirror, unknown claims."""
    report = check(taxonomy.load())
    assert report.problems == []
    assert report.drift.headings == report.drift.papers == []
    assert report.total.oracle == report.total.implemented >= 3
