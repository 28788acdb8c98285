"""The pages, before a builder has seen them."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import markdown
import msgspec
import pytest
from mkdocs.utils.meta import get_data

import taxonomy
from refimpl import results
from refimpl.bench.cells import cells
from taxonomy.query import Taxonomy
from taxonomy.schema import Compiled
from tests.small_tree import FILLED, LAYERS
from tools import docs
from tools.new import scaffold

NASTY = (
    'A <script>alert(1)</script> [x](javascript:alert(2)) <img src=x onerror="alert(3)"> {: onclick="alert(4)" } & done'
)


class Tags(HTMLParser):
    """Elements and attributes that the hostile text would have made."""

    def __init__(self):
        super().__init__()
        self.hostile = []

    def handle_starttag(self, tag, attrs):
        bad = [
            (name, value)
            for name, value in attrs
            if name.startswith("on") or (name in ("href", "src") and "javascript:" in value)
        ]
        if bad or (tag == "img" and ("src", "x") in attrs) or (tag == "script" and not dict(attrs).get("src")):
            self.hostile.append((tag, attrs))


@pytest.fixture(scope="module")
def tree():
    return taxonomy.load()


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave the drawings out, which take most of the time."""
    monkeypatch.setattr(docs.Site, "_picture", lambda *_: "")


def write(tree, out, documents=None):
    site = docs.Site(docs.ROOT, out, tree, results.documents() if documents is None else documents)
    site.write_all()
    return site


def contents(folder: Path):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_entry_has_its_page_at_its_place(tree, tmp_path, no_pictures):
    """Oracle: the mirror rule. The page of compression/low_rank/svd is survey/compression/low_rank/svd.md."""
    site = write(tree, tmp_path)
    expected = {f"survey/{m.path}.md" for m in tree.methods.values()}
    expected |= {f"survey/{c}/index.md" for c in tree.categories}
    expected |= {f"survey/{f.category}/{f.id.replace('-', '_')}.md" for f in tree.frameworks.values()}
    assert expected <= site.kept.keys()
    assert "survey/compression/quantization/weight_only/mse_clip.md" in site.kept


def test_the_same_input_gives_the_same_bytes_and_writes_nothing(tree, tmp_path):
    first, second = write(tree, tmp_path / "a"), write(tree, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(first.kept.values()) == set(second.kept.values()) == {"new"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    again = write(tree, tmp_path / "a")
    assert set(again.kept.values()) == {"same"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}


def changed(tree, **entries):
    """The tree with some entries replaced: `methods={"rtn": {...}}`."""
    kinds = {name: dict(getattr(tree, name)) for name in Compiled.__struct_fields__}
    for kind, changes in entries.items():
        for key, fields in changes.items():
            kinds[kind][key] = msgspec.structs.replace(kinds[kind][key], **fields)
    return Taxonomy(tree.root, Compiled(**kinds))


def test_only_what_changed_is_written_and_what_is_gone_is_removed(tree, tmp_path, no_pictures):
    write(tree, tmp_path)
    (tmp_path / "survey" / "stale.md").write_text("left over")
    site = write(
        changed(tree, methods={"rtn": {"when": "Another advice, long enough to be one, for the page."}}), tmp_path
    )
    touched = {path for path, state in site.kept.items() if state != "same"}
    assert touched == {"survey/compression/quantization/weight_only/rtn.md", "data/taxonomy.json"}
    assert not (tmp_path / "survey" / "stale.md").exists()


def test_texts_of_yaml_files_carry_no_html_and_no_link(tree, tmp_path):
    """Oracle: the rendered page. Every tag of the hostile text arrives as text."""
    hostile = {"name": NASTY, "summary": NASTY, "idea": NASTY, "when": NASTY}
    site = write(
        changed(
            tree,
            methods={"gptq": hostile},
            categories={"compression": {"text": NASTY, "summary": NASTY}},
            papers={"gptq": {"title": NASTY, "venue": NASTY}},
        ),
        tmp_path,
    )
    extensions = ["attr_list", "md_in_html", "tables", "pymdownx.superfences", "pymdownx.details", "tools.mathml"]
    for path in site.kept:
        if path.endswith(".md"):
            found = Tags()
            text, _ = get_data((tmp_path / path).read_text())  # without the front matter
            found.feed(markdown.markdown(text, extensions=extensions))
            assert not found.hostile, f"{found.hostile} in {path}"
    gptq = (tmp_path / "survey/compression/quantization/weight_only/gptq.md").read_text()
    assert "alert(1)" in gptq


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain *emphasis*", "plain *emphasis*"),
        ("$a < b$ and a < b", "$a < b$ and a &lt; b"),
        ("`x[0] < 1` and x[0]", "`x[0] < 1` and x\\[0\\]"),
        ("$$\\frac{a}{b}$$ {.c}", "$$\\frac{a}{b}$$ \\{.c\\}"),
        (None, ""),
    ],
)
def test_safe_leaves_formulas_and_code(text, clean):
    assert docs.safe(text) == clean


def test_a_method_that_runs_shows_claims_results_and_oracles(tree, tmp_path, no_pictures):
    """Oracle: stored documents made up here; each figure must stand on the page, the failed claim with its reason."""
    rtn = tree.methods["rtn"]
    claim = msgspec.structs.replace(rtn.claims[0], holds=False, why="it was worse here")
    documents = {
        "claims": {
            "claims": [{"method": "rtn", "claim": claim.id, "value": 0.75, "holds": False}],
            "environment": {"torch": "9.9"},
        },
        "weights": {
            "arena": "weights",
            "about": "A layer.",
            "baseline": "16 bit",
            "environment": {"torch": "9.9"},
            "metrics": [{"name": "output_error", "unit": "share", "better": "lower", "exact": True}],
            "rows": [
                {"method": "16 bit", "settings": {}, "seed": 0, "figures": {"output_error": 0.001}},
                {"method": "rtn", "settings": {"bits": 4}, "seed": 0, "figures": {"output_error": 0.11}},
                {"method": "rtn", "settings": {"bits": 4}, "seed": 1, "figures": {"output_error": 0.13}},
                {"method": "rtn", "settings": {"bits": 9}, "seed": 0, "figures": {}, "error": "ValueError: no"},
            ],
        },
    }
    write(changed(tree, methods={"rtn": {"claims": [claim, *rtn.claims[1:]]}}), tmp_path, documents)
    page = (tmp_path / "survey/compression/quantization/weight_only/rtn.md").read_text()
    assert "does not hold: it was worse here" in page
    assert "0.75" in page
    assert "not yet" in page
    assert "0.12 ±0.01" in page
    assert "ValueError: no" in page
    assert "::: refimpl.compression.quantization.weight_only.rtn" in page
    assert "torchao's affine primitives" in page
    assert json.loads((tmp_path / "results/weights.json").read_text()) == documents["weights"]
    assert (tmp_path / "results/weights.csv").read_text().count("\n") == 5


def test_a_peer_stands_on_its_methods_page_and_on_that_of_all_peers(tree, tmp_path, no_pictures):
    """Oracle: a stored document made up here."""
    row = {"method": "rtn", "peer": "torchao", "version": "9.8", "what": "4 bits", "difference": 0.0, "seconds": 0.5}
    row |= {"time": 0.75, "memory": 1.25}
    stored = {"environment": {"torch": "9.9"}, "peers": [row, row | {"method": "refimpl.model"}]}
    write(tree, tmp_path, {"peers": stored})
    shown = "torchao 9.8 | 4 bits | 0 |"
    whole = (tmp_path / "results/peers.md").read_text()
    assert "| `refimpl.model` | torchao 9.8 |" in whole
    assert shown in whole and "0.5 | 0.75× | 1.25×" in whole and "9.9" in whole
    assert f"{shown} 0.75× | 1.25×" in (tmp_path / "survey/compression/quantization/weight_only/rtn.md").read_text()
    assert "Beside" not in (tmp_path / "survey/finetuning/peft/lora/lora.md").read_text()


def test_an_arenas_page_has_a_table_a_metric_plots_curves_and_data(tree, tmp_path, no_pictures):
    """Oracle: a stored document made up here, with two axes, three seeds, a curve and a row of another environment."""
    rows = [
        {
            "method": method,
            "settings": {},
            "axes": {"task": task, "length": 8},
            "seed": seed,
            "figures": {"score": seed / 2, "kept_bytes": 64},
            "curves": {"loss over tokens": [[1, 2.5], [2, 1.5]]},
        }
        for method in ("none", "rtn", "mine:Mine")
        for task in ("sum", "count")
        for seed in (0, 1, 2)
    ]
    for row in rows[-6:]:
        row["environment"] = {"torch": "1.1"}
    document = {
        "arena": "toy", "about": "Toys.", "version": 1, "baseline": "none", "seeds": [0, 1, 2], "model": "qwen",
        "axes": {"task": ["sum", "count"], "length": [8]}, "environment": {"torch": "9.9"}, "quick": True, "rows": rows,
        "metrics": [
            {"name": "score", "unit": "share", "better": "higher", "exact": True},
            {"name": "kept_bytes", "unit": "bytes", "better": "lower", "exact": False},
        ],
    }  # fmt: skip
    write(tree, tmp_path, {"toy": document})
    page = (tmp_path / "results/toy.md").read_text()
    for said in (
        "**score (share) by task, length 8**",
        "**kept bytes (bytes) by task, length 8**",
        "| method | settings | sum | count | mean |",
        "| **none** |  | 0.5 ±0.5 | 0.5 ±0.5 | 0.5 |",
        "| mine:Mine |  |",
        "## Loss over tokens",
        "Measured in the quick form",
        "on the model *qwen*",
        "Seeds 0, 1, 2",
        "(toy.json)",
        "(toy.csv)",
        "mine:Mine: with torch 1.1.",
    ):
        assert said in page, said
    assert page.count('<div class="plot"') == 2
    assert len(list(csv.DictReader((tmp_path / "results/toy.csv").read_text().splitlines()))) == 18


def test_an_arena_that_prices_steps_says_where_they_pay(tree, tmp_path, no_pictures):
    """Oracle: a stored document made up here: half a second for each GB is 2 GB a second; another arena's page has nothing of it."""
    figures = {"bytes": 8, "seconds_per_token": 1.0, "price": 0.5, "read_seconds": 0.1}
    document = {
        "arena": "toy", "about": "Toys.", "version": 1, "baseline": "full cache", "seeds": [0], "axes": {"tokens": [8]},
        "environment": {"torch": "9.9"},
        "metrics": [{"name": name, "unit": "u", "better": "lower", "exact": False} for name in figures],
        "rows": [
            {"method": method, "settings": {}, "axes": {"tokens": 8}, "seed": 0, "figures": figures}
            for method in ("full cache", "kivi", "tools.quanto_cache:QuantoCache", "elsewhere:Mine")
        ],
    }  # fmt: skip
    other = document | {"metrics": document["metrics"][:2], "rows": document["rows"][:2]}
    write(tree, tmp_path, {"toy": document, "other": other})
    page = (tmp_path / "results/toy.md").read_text()
    assert "| method | settings | tokens 8: GB/s |" in page and "memory gives 10 GB/s" in page
    assert "[KIVI](../survey/inference/kv_cache/quantized/kivi.md) |  | 2 |" in page
    assert page.index("Below which bandwidth") < page.index("the roofline") < page.index("## All figures")
    assert (
        "Rows *tools.quanto_cache:QuantoCache* are no method of the survey: Transformers' own quantized cache" in page
    )
    assert "Rows *elsewhere:Mine*" not in page and "Rows *full cache*" not in page
    other_page = (tmp_path / "results/other.md").read_text()
    assert not any(said in other_page for said in ("bandwidth", "roofline", "All figures", "no method of the survey"))


def test_oracles_are_read_from_the_tests_docstrings(tmp_path):
    """Oracle: by hand."""
    test = tmp_path / "test_x.py"
    test.write_text('def test_a():\n    """Oracle: a closed\n    form."""\n\n\ndef test_b():\n    """Other."""\n')
    assert docs.oracles(test) == ["a closed form."]
    assert docs.oracles(tmp_path / "absent.py") == []


def test_from_scaffold_to_page_with_no_other_edit(small_tree, tmp_path):
    """Three files are written and filled; page, menu, tables, graph, exports and arena have the method."""
    checkout = small_tree.parent
    knowledge, code, test = scaffold(f"{LAYERS}/half-quadratic", checkout)
    text = knowledge.read_text()
    for empty, filled in FILLED.items():
        text = text.replace(empty, filled)
    knowledge.write_text(text.replace("arena: {}", "arena: {weights: {bits: [2, 4]}}"))
    code.write_text('"""HQ."""\n\n\nclass HalfQuadratic:\n    """Computes it."""\n')
    test.write_text('def test_it():\n    """Oracle: a closed form of its own."""\n')

    tree = taxonomy.load(small_tree)
    site = docs.Site(checkout, tmp_path / "site", tree, {})
    site.write_all()
    page = (site.out / "survey" / LAYERS / "half_quadratic.md").read_text()
    assert "Does what it says." in page
    assert "a closed form of its own." in page
    assert "It is better than rounding." in page
    assert "$ effllm run half-quadratic" in page
    assert "- half_quadratic.md" in (site.out / "survey" / LAYERS / ".nav.yml").read_text()
    for listing in (
        f"survey/{LAYERS}/index.md",
        "survey/index.md",
        "results/claims.md",
        "graph.md",
        "data/methods.csv",
    ):
        assert "half" in (site.out / listing).read_text().lower(), listing
    assert [cell.settings for cell in cells([tree.methods["half-quadratic"]])] == [{}, {"bits": 2}, {"bits": 4}]


def test_reading_lists_have_a_line_for_each_paper(tree, tmp_path, no_pictures):
    """Oracle: the taxonomy. As many items as papers are filed in the category."""
    write(tree, tmp_path)
    for category in tree.categories.values():
        text = (tmp_path / "survey" / category.id / "index.md").read_text()
        _, heading, rest = text.partition("## Reading list\n")
        items = [line for line in rest.splitlines() if line.startswith("- [")]
        assert len(items) == len(tree.reading_list(category.id)), category.id
        assert bool(heading) == bool(items)


def test_a_category_shows_its_questions_with_what_the_claims_measured(small_tree, tmp_path):
    """Oracle: the small tree's question, and a measured value made up here, and none."""
    row = {"method": "rtn", "claim": "error-bound", "value": 0.4321, "holds": True}
    site = docs.Site(small_tree.parent, tmp_path / "out", taxonomy.load(small_tree), {"claims": {"claims": [row]}})
    site.write_all()
    page = (tmp_path / "out" / "survey" / LAYERS / "index.md").read_text()
    assert "### How far does a weight move?" in page and "By half a step at most" in page
    (measured,) = [line for line in page.splitlines() if "No weight moves by more than half a step." in line]
    assert "[RTN](rtn.md)" in measured and "| 0.4321 | holds |" in measured
    docs.Site(small_tree.parent, tmp_path / "none", taxonomy.load(small_tree), {}).write_all()
    before = (tmp_path / "none" / "survey" / LAYERS / "index.md").read_text()
    assert before == page.replace("| 0.4321 | holds |", "| not yet |  |")
    assert "Settled by running" not in (tmp_path / "out" / "survey" / "finetuning" / "index.md").read_text()
